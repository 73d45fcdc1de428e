"""Links of the pages, and the commands that they show with their output."""

import re
from pathlib import Path

import page_commands
import pytest
from test_docs import commands

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/*.md")),
    *sorted(ROOT.glob("results/**/*.md")),
]
SHOWN = [page for page in PAGES if page_commands.blocks(page.read_text(encoding="utf-8"))]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return "\n".join("" if line.startswith("    ") else line for line in text.splitlines())


def anchors(page: Path) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", prose(page), re.M)
    words = (re.sub(r"[^\w\- ]", "", x.replace("\\_", "_").lower()) for x in found)
    return {x.replace(" ", "-") for x in words}


def dead_links(page: Path) -> list[str]:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page))):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or not path.is_relative_to(ROOT):
            dead.append(link)
        elif anchor and anchor not in anchors(path):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_link_is_dead(page):
    assert dead_links(page) == []


def test_a_dead_link_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("test_pages.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# One two\n[a](gone.md) [b](#one-two) [c](#three) [d](https://x.org)\n")
    assert dead_links(page) == ["gone.md", "#three"]


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"}
    assert {link for link in re.findall(r"\]\((\w+\.md)\)", index)} == pages


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_what_agrees():
    printed = ["a  12 s", "b", "c 1e-3", "d"]
    assert page_commands.agree(["a 3.5 s", "...", "d"], printed)
    assert page_commands.agree(["...", "c 2"], printed[:3])
    assert not page_commands.agree(["a 3.5 s", "d"], printed)
    assert not page_commands.agree(["...", "c 2"], printed)


def test_the_numbers_of_this_run_are_filled_in():
    shown, printed = ["a 0", "...", "last 0"], ["a 3", "b 4", "last 5", "last 6"]
    assert page_commands.fill(shown, printed) == ["a 3", "...", "last 6"]
    assert page_commands.fill(["-"], printed) == printed


@pytest.mark.slow
@pytest.mark.parametrize("page", SHOWN, ids=name)
def test_shown_output_is_what_is_printed(page, tmp_path):
    folder = page_commands.workplace(tmp_path)
    for command, shown in page_commands.blocks(page.read_text(encoding="utf-8")):
        printed = page_commands.run(command, folder)
        assert page_commands.agree(shown, printed), "\n".join([command, *printed])


# what can run without a network, a GPU or files that the page does not make
OFFLINE = re.compile(
    r"--help|tables\.py list|tables\.py show|data_name digits|tables\.py .*dry_run"
)
CASES = [
    (page.name, command)
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    for command in commands(page)
    if OFFLINE.search(command) and "..." not in command
]


@pytest.mark.slow
@pytest.mark.parametrize("page, command", CASES, ids=[f"{p}: {c[:60]}" for p, c in CASES])
def test_a_command_without_shown_output_runs(page, command, tmp_path):
    before = sorted(ROOT.glob("results/**/*"))
    done = page_commands.execute(f"python {command}", page_commands.workplace(tmp_path))
    assert done.returncode == 0, done.stderr
    assert sorted(ROOT.glob("results/**/*")) == before


def test_there_are_such_commands():
    assert len(CASES) >= 8


# --- the page in Chinese --------------------------------------------------------------------------

BOTH = ROOT / "README.md", ROOT / "README.zh-CN.md"


def parts(page: Path) -> list[tuple[str, str]]:
    """[(level of the heading, its text with what is below it)]"""
    found = re.split(r"^(#+) (?=\S)", page.read_text(encoding="utf-8"), flags=re.M)
    return list(zip(found[1::2], found[2::2]))


def code(text: str) -> list[str]:
    """The lines of code and their output, without comments and without the layout's words."""
    lines = [x for x in text.splitlines() if x.startswith("    ")]
    return [
        re.split(r" {2,}# ", x)[0].rstrip() for x in lines if not re.match(r" +\w+(\.py|/) ", x)
    ]


def numbers(text: str) -> list[str]:
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", text))


def test_both_have_the_same_headings_commands_and_numbers():
    english, chinese = map(parts, BOTH)
    assert [level for level, _ in english] == [level for level, _ in chinese]
    for (_, one), (_, other) in zip(english, chinese):
        heading = one.splitlines()[0]
        assert code(one) == code(other), heading
        assert numbers(one) == numbers(other), heading


def test_each_links_to_the_other_in_its_first_lines():
    for page, other in (BOTH, BOTH[::-1]):
        first = page.read_text(encoding="utf-8").splitlines()[:3]
        assert any(f"]({other.name})" in line for line in first)


def test_links_and_tables_are_the_same():
    links = [set(re.findall(r"\]\((\S+?)\)", page.read_text(encoding="utf-8"))) for page in BOTH]
    assert links[0] ^ links[1] == {page.name for page in BOTH}
    results = [page.read_text(encoding="utf-8").split("<!-- tables.py")[1] for page in BOTH]
    tables = [text.split("<!-- end of the table -->")[0] for text in results]
    assert tables[0] == tables[1]
