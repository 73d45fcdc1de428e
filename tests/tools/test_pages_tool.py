"""The generated parts of the pages agree with the table of methods."""

import re
from pathlib import Path

import pytest
from conftest import tiers

from kd_losses import METHODS
from tools import pages

ROOT = Path(__file__).resolve().parents[2]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_rows(name):
    """A new method may be missing (`tools/pages.py --check` reports it), but no row is stale."""
    block = text(name).split(pages.MARKS[0])[1].split(pages.MARKS[1])[0]
    rows = [line for line in block.splitlines() if line.startswith("| [`")]
    shown = [line.split("`")[1] for line in rows]
    assert len(shown) >= 47 and shown == [mode for mode in METHODS if mode in shown]
    assert rows == [pages.row(mode, chinese="zh" in name) for mode in shown]
    if "zh" in name:
        assert not re.search(r"\| [^|]*(feature|logits and|labels)[^|]*\| [^|]*\|$", block, re.M)


SHOWN = ["at", "dkd", "reviewkd", "ft", "crd", "simkd"]


@pytest.mark.parametrize("mode", tiers(METHODS, *SHOWN))
def test_sections(mode):
    page = text("docs/methods.md")
    if f"\n### {mode}\n" not in page:
        assert mode not in SHOWN, "only a new method may be missing"
        return
    assert f"{pages.section(mode)}\n" in page


def test_a_method_without_a_paper(tmp_path, monkeypatch):
    (tmp_path / "kd_losses").mkdir()
    text = (ROOT / "kd_losses/st.py").read_text(encoding="utf-8")
    text = text.replace(text.split('"""')[1], "Cosine of the logits: an example, of no paper.", 1)
    (tmp_path / "kd_losses/st.py").write_text(text)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert pages.row("st") == "| [`st`](kd_losses/st.py) | - | logits | 0.1 |"
    assert pages.Source("st").title == "Cosine of the logits: an example, of no paper"


def test_stale_pages_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "PAGES", ("README.md",))
    monkeypatch.setattr(pages, "table", lambda chinese: "new")
    page = tmp_path / "README.md"
    page.write_text(f"a\n{pages.MARKS[0]}\nold\n{pages.MARKS[1]}\nb\n")
    assert pages.main(["--check"]) == 1 and "README.md" in capsys.readouterr().out
    assert "old" in page.read_text()
    assert pages.main([]) == 0
    assert page.read_text() == f"a\n{pages.MARKS[0]}\nnew\n{pages.MARKS[1]}\nb\n"
    assert pages.main(["--check"]) == 0


def test_short_citation():
    assert pages.short("Tian, Krishnan, Isola, ICLR 2020, section 3") == "Tian et al., ICLR 2020"
    assert pages.short("Ba, Caruana, NIPS 2014, equation 1") == "Ba, Caruana, NIPS 2014"
