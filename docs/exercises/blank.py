"""Write the files of the exercises: the repository's own, with the functions to write taken out.

    python docs/exercises/blank.py mine           all eleven
    python docs/exercises/blank.py mine 1 4       only these; the rest of their files stays whole

Of a function that is taken out stay its signature, its docstring and the comments that state an
equation; a raise takes the place of its code. docs/exercises/README.md says what to do with them.
"""

import argparse
import ast
import io
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SOLUTIONS = "docs/exercises/solutions"
# In two parts: a search of the repository for unfinished code looks for the whole word.
EXCEPTION = "NotImplemented" + "Error"


class Exercise(NamedTuple):
    source: str  # the file, from the root of the repository, that holds the functions
    functions: tuple  # the names of the functions to write
    minutes: int

    @property
    def file(self):
        """The student's file."""
        return Path(self.source).name


EXERCISES = {
    1: Exercise("copo.py", ("consistency_entropy",), 15),
    2: Exercise(
        "copo.py",
        ("sample_variance", "standardise", "group_advantage", "global_advantages"),
        30,
    ),
    3: Exercise("copo.py", ("correct_response", "solved_group", "mixed_group", "local_weight"), 30),
    4: Exercise("copo.py", ("clipped_loss",), 40),
    5: Exercise("copo.py", ("aggregate",), 40),
    6: Exercise(f"{SOLUTIONS}/lengths.py", ("response_lengths", "response_mask"), 20),
    7: Exercise(f"{SOLUTIONS}/logprobs.py", ("plain_logprobs",), 20),
    8: Exercise("copo.py", ("k3",), 20),
    9: Exercise("eval.py", ("maj_at_k", "pass_at_k"), 25),
    10: Exercise(f"{SOLUTIONS}/plain_sampler.py", ("generate_plain",), 40),
    11: Exercise(
        f"{SOLUTIONS}/fool.py",
        ("fool_contains", "fool_last_number", "fool_any_box", "fool_same_digits"),
        30,
    ),
}


class Comment(NamedTuple):
    line: int  # its first line, from 1
    lines: list  # its text, without the indentation


def find_equations(source):
    """The comments that state an equation: whole lines, the first of which holds " = "."""
    comments = []
    last_line = None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line[: token.start[1]].strip():
            continue
        line = token.start[0]
        if line - 1 == last_line:
            comments[-1].lines.append(token.string)
        else:
            comments.append(Comment(line, [token.string]))
        last_line = line
    return [comment for comment in comments if " = " in comment.lines[0]]


def signature_end(source, function):
    """The line on which the signature of a function of this source ends."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE and token.start[0] >= function.lineno:
            return token.start[0]


def blank_body(source, statements, first_line, comments, parameters, error):
    """Lines that take the place of these statements: equations in their places, then a raise.

    An `if` stays where it asks only for parameters and an equation stands in it.
    """
    indent = " " * statements[0].col_offset
    lines = []
    for statement in statements:
        inside = []
        for comment in comments:
            if first_line <= comment.line < statement.lineno:
                lines += [indent + text for text in comment.lines]
            elif statement.lineno <= comment.line <= statement.end_lineno:
                inside.append(comment)
        if inside and is_choice(statement, parameters):
            condition = ast.get_source_segment(source, statement.test)
            lines.append(f"{indent}if {condition}:")
            start = statement.test.end_lineno + 1
            lines += blank_body(source, statement.body, start, inside, parameters, error)
        else:
            for comment in inside:
                lines += [indent + text for text in comment.lines]
        first_line = statement.end_lineno + 1
    return [*lines, f'{indent}raise {EXCEPTION}("{error}")']


def is_choice(statement, parameters):
    """Whether a statement is an `if` without else that asks for nothing but parameters."""
    if not isinstance(statement, ast.If) or statement.orelse:
        return False
    names = {node.id for node in ast.walk(statement.test) if isinstance(node, ast.Name)}
    return names <= parameters


def blank_functions(source, names):
    """The source with these functions taken out: names {function: number of the exercise}.

    ValueError if one of them is not there.
    """
    lines = source.split("\n")
    comments = find_equations(source)
    functions = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = node
    missing = set(names) - set(functions)
    if missing:
        raise ValueError(f"there is no function {', '.join(sorted(missing))}")
    for name in sorted(names, key=lambda name: -functions[name].lineno):  # from the end upwards
        function = functions[name]
        statements = function.body
        header_end = signature_end(source, function)
        if ast.get_docstring(function) is not None:
            header_end = statements[0].end_lineno
            statements = statements[1:]
        own = [c for c in comments if header_end < c.line <= function.end_lineno]
        parameters = {argument.arg for argument in function.args.args}
        error = f"exercise {names[name]}: {name} is still to be written"
        body = blank_body(source, statements, header_end + 1, own, parameters, error)
        lines[header_end : function.end_lineno] = body
    return "\n".join(lines)


def blanked_files(numbers):
    """The files of these exercises: {name: text}."""
    to_write = {}
    for number in numbers:
        exercise = EXERCISES[number]
        names = to_write.setdefault(exercise.source, {})
        names.update(dict.fromkeys(exercise.functions, number))
    files = {}
    for source, names in to_write.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files[Path(source).name] = blank_functions(text, names)
    return files


def exit_with_error(script, message):
    print(f"{script}: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_command(script, description, folder_help, argv):
    """The folder and the numbers of a command line; of blank.py and grade.py."""
    parser = argparse.ArgumentParser(prog=script, description=description)
    parser.error = lambda message: exit_with_error(script, message)
    parser.add_argument("folder", type=Path, help=folder_help)
    parser.add_argument("numbers", type=int, nargs="*", help="exercises, 1 to 11 (default: all)")
    args = parser.parse_args(argv)
    for number in args.numbers:
        if number not in EXERCISES:
            parser.error(f"there is no exercise {number}; they are numbered 1 to {len(EXERCISES)}")
    return args.folder, sorted(set(args.numbers)) or list(EXERCISES)


def main(argv=None):
    folder, numbers = read_command(
        "blank.py", __doc__.split("\n")[0], "folder for the files; made if it is not there", argv
    )
    files = blanked_files(numbers)
    for name in files:
        if (folder / name).exists():
            exit_with_error("blank.py", f"{folder / name} is there already; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        exit_with_error("blank.py", f"cannot write into {folder}: {error.strerror}")
    for number in numbers:
        exercise = EXERCISES[number]
        functions = ", ".join(exercise.functions)
        print(f"{number:>2}  {folder / exercise.file}: {functions} ({exercise.minutes} minutes)")


if __name__ == "__main__":
    main()
