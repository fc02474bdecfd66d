r"""Four checkers of answers, weak on purpose, as people write them: material for exercise 11.

Each takes the text of a response and the reference answer, and says whether it is right. A policy
that is trained on such a reward finds what it accepts; reward = correctness is a claim about the
checker.
"""

import re

CHECKERS = ("contains", "last_number", "any_box", "same_digits")
BOX = re.compile(r"\\boxed\{([^{}]*)\}")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def contains(response, reference):
    """The reference stands somewhere in the response."""
    return reference in response


def last_number(response, reference):
    """The last number of the response is the reference."""
    numbers = NUMBER.findall(response)
    return bool(numbers) and numbers[-1] == reference


def any_box(response, reference):
    """One of the boxes holds the reference."""
    return reference in BOX.findall(response)


def same_digits(response, reference):
    """The last box holds the reference, once everything but digits is taken away from both."""
    boxes = BOX.findall(response)
    return bool(boxes) and re.sub(r"\D", "", boxes[-1]) == re.sub(r"\D", "", reference)
