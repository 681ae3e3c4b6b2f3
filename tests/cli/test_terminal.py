"""Rich draws on terminals, and only there; a pipe gets the same words."""

import io
import re
import subprocess
import sys

import pytest

from pseudo_terminal import Screen, on_terminal
from ramblock.cli.terminal import Cell, Styled, Terminal
from trace_samples import DATA

_CHECK = ("check", str(DATA / "qemu-snp-reset.trace.gz"))
_MARKUP = "[bold]x[/bold] :smile: [/] 0x10 'text' https://x.example"
_ROWS: list[list[Cell]] = [
    ["2 stale", "[0x200000, 0x210000)", ["0123456789" * 3, ("of ", Styled("two", "red"))], "17"],
    ["transitional", "-", "a window in words, which fold", "252,698..312,960"],
]


@pytest.fixture(autouse=True)
def _of_usual_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)


def _shown(*arguments: str) -> str:
    """Run a command into pipes; say whether rich was imported for it."""
    code = (
        "import sys\nfrom ramblock.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n"
        "    sys.stderr.write(str([name for name in sys.modules if name.startswith('rich')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.stdout
    return done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        _CHECK,
        ("check", "--json", _CHECK[1]),
        ("check", "--how", "qemu"),
        ("doctor",),
        ("plan", "--memory", "1G"),
        ("run", "--memory", "256M", "--conversions", "20"),
        ("--help",),
        ("--version",),
    ],
    ids=" ".join,
)
def test_a_pipe_needs_no_rich(arguments: tuple[str, ...]) -> None:
    assert _shown(*arguments) == "[]"


def _words(text: str) -> str:
    return "".join(sorted("".join(text.split())))


@pytest.mark.parametrize("columns", [1, 20, 40, 60, 80, 200])
def test_a_terminal_of_any_width_loses_nothing(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    screen, pipe = Screen(), io.StringIO()
    for stream in (screen, pipe):
        terminal = Terminal(stream)
        terminal.table(_ROWS, header=["what", "range", "", "first after"], right=(3,))
        terminal.table([])
        terminal.line("word " * 30, Styled("more " * 3, "bold red"), hang=6)
    assert _words(screen.picture) == _words(pipe.getvalue())
    assert max(map(len, screen.picture.splitlines())) <= max(columns, 40)


def test_a_table_in_a_pipe() -> None:
    pipe = io.StringIO()
    Terminal(pipe).table(_ROWS, header=["what", "range", "", "number"], right=(3,))
    assert pipe.getvalue().splitlines() == [
        "what          range                                                           number",
        "2 stale       [0x200000, 0x210000)  012345678901234567890123456789                17",
        "                                    of two",
        "transitional  -                     a window in words, which fold   252,698..312,960",
    ]


def test_lines_hang() -> None:
    screen = Screen()
    Terminal(screen).line("- " + "word " * 30, hang=2)
    first, *others = screen.getvalue().splitlines()
    assert first.startswith("- word word")
    assert others
    assert all(line.startswith("  word") for line in others)


def test_text_is_no_markup() -> None:
    screen = Screen()
    terminal = Terminal(screen)
    terminal.line(_MARKUP)
    terminal.table([[_MARKUP]], header=[_MARKUP])
    terminal.draw([_MARKUP])
    terminal.clear()
    terminal.draw_progress(_MARKUP, 0, None)
    assert screen.getvalue().count(_MARKUP) >= 5, "as it is, and nothing highlighted"


def test_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, coloured in (("xterm", True), ("dumb", False)):
        monkeypatch.setenv("TERM", kind)
        screen = Screen()
        Terminal(screen).line("a ", Styled("b", "bold red"))
        assert ("\x1b[1;31mb\x1b[0m" in screen.getvalue()) is coloured
        assert screen.picture == "a b\n"


def test_a_picture_goes_and_the_cursor_comes_back() -> None:
    screen = Screen()
    terminal = Terminal(screen)
    for number in range(3):
        terminal.draw([f"line {number}", Styled("wide " * 50, "green")])
    terminal.clear()
    assert "line 2" in screen.getvalue()
    lines = [
        re.sub(r"\x1b\[[?0-9;]*\w", "", line) for line in re.split("[\r\n]", screen.getvalue())
    ]
    assert max(map(len, lines)) == 77, "the terminal's own ^C has room"
    assert screen.getvalue().rindex("\x1b[?25h") > screen.getvalue().rindex("\x1b[?25l")
    assert screen.getvalue().endswith("\x1b[1A\x1b[2K" * 2)
    terminal.clear()


def test_a_bar() -> None:
    screen = Screen()
    terminal = Terminal(screen)
    terminal.draw_progress("1 of 4 guests", 1, 4)
    terminal.draw_progress("3 of 4 guests", 3, 4)
    terminal.clear()
    assert "3 of 4 guests" in screen.picture
    assert "━" in screen.picture


def test_a_terminal_that_knows_no_unicode() -> None:
    class Old(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    raw = io.BytesIO()
    stream = Old(raw, encoding="ascii")
    terminal = Terminal(stream)
    terminal.line("5 µs")
    terminal.table([["5 µs"]])
    terminal.draw_progress("5 µs", 1, 2)
    terminal.clear()
    stream.flush()
    assert raw.getvalue().count(b"5 \\xb5s") >= 3


def test_a_command_on_a_real_terminal() -> None:
    shown = on_terminal(*_CHECK, columns=80, kind="xterm")
    assert shown.returncode == 1
    assert "\x1b[1;31m" in shown.stdout
    assert max(map(len, on_terminal(*_CHECK, columns=60).stdout.splitlines())) <= 60
