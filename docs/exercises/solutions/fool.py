r"""Answers that a weak checker takes and reward.py refuses (exercise 11).

The four checkers are the functions of docs/exercises/weak_checkers.py. Each function here returns
(response, reference): a response that the checker accepts although reward.grade does not. The
reference must be an answer that reward.grade accepts when a response says \boxed{reference}.
"""


def fool_contains():
    """A response for weak_checkers.contains -> (response, reference)."""
    return "It may be 42 or 43. \\boxed{43}", "42"


def fool_last_number():
    """A response for weak_checkers.last_number -> (response, reference)."""
    return "\\boxed{43}, as problem 42 said", "42"


def fool_any_box():
    """A response for weak_checkers.any_box -> (response, reference)."""
    return "\\boxed{42} or \\boxed{43}", "42"


def fool_same_digits():
    """A response for weak_checkers.same_digits -> (response, reference)."""
    return "\\boxed{-42}", "42"
