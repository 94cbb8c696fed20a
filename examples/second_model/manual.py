"""Plain text of manual pages in roff's `man` macros."""

import re
from collections.abc import Iterator

GLYPHS = {
    "aq": "'", "cq": "'", "oq": "`", "lq": '"', "rq": '"', "dq": '"', "ga": "`", "em": " - ",
    "en": "-", "hy": "-", "--": "-", "bu": "*", "ha": "^", "ti": "~", "rs": "\\", "sl": "/",
    "at": "@", "sh": "#", "Do": "$", "or": "|", "ba": "|", "lB": "[", "rB": "]", "la": "<",
    "ra": ">", "->": "->", "<-": "<-", ">=": ">=", "<=": "<=", "!=": "!=", "mu": "x", "mc": "u",
    "co": "(C)", "rg": "(R)", "tm": "(TM)", "R": "(R)", "Tm": "(TM)", "Aq": "'", "C+": "C++",
    "C`": '"', "C'": '"', 'L"': '"', 'R"': '"', "``": '"', "''": '"', "PI": "pi", "Gt": ">",
    "Lt": "<", "Am": "&",
}  # fmt: skip
PLAIN = {"e": "\\", "t": "\t", "~": " ", "0": " "} | {c: c for c in "\\ -'`."}
ESCAPE = re.compile(
    r"""\\(?:
      f(?:\[[^]]*\]|\(..|.)                               # fonts
    | s(?:[-+]\d|[1-3]\d|\d|\[[^]]*\]|'[^']*')            # sizes
    | (?P<forward>h'\+[^']*')                             # motion to the right is a space
    | [hvwNdlLDXbZo]'[^']*'                               # other motion, drawing, widths
    | [nmMFkg](?:\[[^]]*\]|\(..|[-+]?.)                   # registers, colours
    | \*?\((?P<two>..) | \*?\[(?P<long>[^]]*)\] | \*(?P<one>.)
    | (?P<plain>.)
    )""",
    re.VERBOSE,
)
REQUEST = re.compile(r"[.'][ \t]*([A-Za-z][A-Za-z0-9]*)[ \t]*(.*)")
ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|((?:\\.|[^\s\\])+)')
SKIPPED = {"de": "..", "de1": "..", "am": "..", "ig": "..", "TS": ".TE", "EQ": ".EN", "PS": ".PE"}
FONTS = {"B": " ", "I": " ", "R": " ", "SM": " ", "SB": " "} | dict.fromkeys(
    ["BI", "BR", "IB", "IR", "RB", "RI"], ""
)
PARAGRAPHS = {"PP", "P", "LP", "HP", "TP", "IP", "RS", "RE", "sp", "Sp"}
AS_IS = {"nf": True, "EX": True, "Vb": True, "fi": False, "EE": False, "Ve": False}


def resolve(match: re.Match[str]) -> str:
    if match["plain"]:
        return PLAIN.get(match["plain"], "")
    if match["forward"]:
        return " "
    name = match["two"] or match["long"] or match["one"] or ""
    if re.fullmatch(r"u[0-9A-F]{4,5}", name):
        return chr(int(name[1:], 16))
    return GLYPHS.get(name, "")


def arguments(text: str) -> list[str]:
    """Arguments of a request; a doubled quote inside quotes is a quote."""
    return [quoted.replace('""', '"') or bare for quoted, bare in ARGUMENT.findall(text)]


def skip_braces(lines: Iterator[str], opened: str) -> None:
    """Pass over a block in braces whose first line is given."""
    depth = opened.count("\\{") - opened.count("\\}")
    while depth > 0 and (line := next(lines, None)) is not None:
        depth += line.count("\\{") - line.count("\\}")


def holds(condition: str) -> bool:
    """We answer as groff on a terminal; a register's value is taken for zero."""
    return condition in {"n", "!t"} or condition.startswith("\\n(.g")


def shown(lines: Iterator[str]) -> Iterator[str]:
    """Lines that a terminal shows: no comments, definitions, tables, branches for printers."""
    otherwise = False
    for line in lines:
        line = re.sub(r'\\["#].*', "", line)
        while (request := REQUEST.match(line)) and request[1] in {"if", "ie", "el"}:
            condition, _, rest = request[2].partition(" ")
            if request[1] == "el":
                takes, rest = otherwise, request[2]
            else:
                takes = holds(condition)
            otherwise = request[1] == "ie" and not takes
            if not takes:
                skip_braces(lines, rest)
            line = rest.replace("\\{", "").lstrip() if takes else ""
        if request and request[1] in SKIPPED:
            end = SKIPPED[request[1]]
            next((x for x in lines if x.replace(" ", "").startswith(end)), None)
        elif line := line.replace("\\}", "").removesuffix("\\"):
            yield line


def layout(name: str, given: list[str]) -> str:
    """White space, headings and tags that a request puts before the next text."""
    if name in {"SH", "SS"}:
        return f"\n\n{' '.join(given)}\n\n"
    if name == "IP" and given:
        return f"\n\n{given[0]}" + (" " if len(given[0]) < 6 else "\n")
    if name in PARAGRAPHS:
        return "\n\n"
    return "\n" if name in {"br", "TQ"} | AS_IS.keys() else ""


def plain(page: str) -> str:
    """Text of a page in `man` macros: filled paragraphs on one line, examples as they are.

    Pages in `mdoc` macros, which nest, give an empty text; tables and equations are left out.
    """
    if re.search(r"^\.Dd ", page, re.MULTILINE):
        return ""
    pieces: list[str] = []
    as_is, tag = False, False
    for line in shown(iter(page.replace("\\\n", "").split("\n"))):
        request = REQUEST.match(line)
        if request and request[1] in FONTS:
            line = FONTS[request[1]].join(arguments(request[2]))
        elif request:
            name = request[1]
            pieces.append(layout(name, arguments(request[2])))
            as_is = AS_IS.get(name, as_is and name not in {"SH", "SS"})
            tag = name in {"TP", "TQ"} or (tag and name == "PD")
            continue
        elif line[0] in ".'":
            continue
        elif line[0] == " " and not as_is:
            pieces.append("\n")
        pieces += [line, "" if line.endswith("\\c") else "\n" if as_is or tag else " "]
        tag = False
    text = ESCAPE.sub(resolve, "".join(pieces))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()
