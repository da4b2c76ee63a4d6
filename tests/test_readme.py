"""Code in README and guide runs as printed; links between documents and commands in them lead somewhere."""

import pathlib
import re

import matplotlib
import pytest

from tests.marks import slow

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
DOCUMENTS += tuple(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))


def code_blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", ["README.md", *slow("docs/adopt.md")])
def test_python_blocks_run_in_order(document, tmp_path, monkeypatch):
    """Slow: the guide trains in every framework; `tests/integrations/` has the same in small."""
    blocks = code_blocks((ROOT / document).read_text(encoding="utf-8"), "python")
    assert blocks, f"{document} shows no Python"
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    namespace = {"__name__": "readme"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{document}, python block {number}", "exec"), namespace)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    local = [link.split("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    missing = [link for link in local if not (ROOT / document).parent.joinpath(link).exists()]
    assert not missing, f"{document} links to what is not there: {missing}"


def test_every_command_of_make_is_one():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+): ## ", makefile, flags=re.MULTILINE))
    texts = [(ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS]
    said = re.findall(r"`make ([a-z -]+?)(?: ARGS=[^`]*)?`", " ".join(texts))
    used = {target for command in said for target in command.split()}
    assert used and used <= targets, used - targets
