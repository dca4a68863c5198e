"""An answer as tokens that say what it does: without layout, comments and names that can change."""

import io
import keyword
import re
import tokenize
from collections.abc import Iterator
from contextlib import suppress

LONGEST = 50_000  # characters of an answer that are looked at
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def of_answer(source: str, kind: str) -> list[str]:
    """Return the tokens of an answer.

    Args:
        source: The text of its cell.
        kind: "code", or that of a cell with a text, whose tokens are its words.
    """
    source = source[:LONGEST]
    return list(_of_code(source)) if kind == "code" else re.findall(r"\w+", source.casefold())


def _of_code(code: str) -> Iterator[str]:
    before = ""
    # Answers need not be Python: what comes before the error counts.
    with suppress(tokenize.TokenError, SyntaxError):
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type in LAYOUT:
                continue
            # An attribute's name is a library's, mostly.
            own = token.type == tokenize.NAME and before != "."
            text = "name" if own and not keyword.iskeyword(token.string) else token.string
            yield "text" if token.type == tokenize.STRING else text
            before = token.string
