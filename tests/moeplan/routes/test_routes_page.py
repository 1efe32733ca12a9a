"""The HTML page of `moeplan routes --html`: it needs nothing but itself, in light and in dark."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from routes_cases import example

from executor.errors import RunError
from moeplan.errors import UserError
from moeplan.routes import page as page_module
from moeplan.routes.page import MAX_OPEN_ROWS, check_place, page, write_page
from moeplan.routes.statistics import Text

pytest.importorskip("matplotlib")

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--window-size=900,1600",
]
SECONDS = 120
ROOT = Path(page_module.__file__).parents[2]
HOSTILE = """<script>alert(1)</script>"'&amp;<img src=http://evil.example/x>$\\frac{$\x1b\x00\ud800𝄞"""
VOID = {"meta", "img", "br", "link", "input"}


class Parsed(HTMLParser):
    """Elements with attributes, and what is said between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.said: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "defs"} & set(self.open):
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


@pytest.fixture(scope="module")
def small() -> str:
    return page(example(2, 4, preference=0.3).to_data())


@pytest.fixture(scope="module")
def large() -> str:
    return page(example(64, 32, 8).to_data())


@pytest.mark.parametrize("which", ["small", "large"])
def test_nothing_is_loaded_from_anywhere(which: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(which)
    for tag, attributes in Parsed(text).elements:
        assert tag not in {"script", "link", "iframe", "img", "object", "embed", "base"}
        for name, value in attributes.items():
            if name in {"src", "href", "xlink:href", "srcset", "action"}:
                assert (value or "").startswith(("data:image/png;base64,", "#")), (tag, name)
            elif not name.startswith("xmlns"):
                assert "http" not in (value or "").replace("http-equiv", ""), (tag, name)
    assert not re.search(r"""https?://(?!www\.w3\.org/(2000/svg|1999/xlink)")""", text)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_the_page_forbids_itself_to_load_anything(small: str) -> None:
    policies = [
        of["content"] for tag, of in Parsed(small).elements if of.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


@pytest.mark.parametrize("which", ["small", "large"])
def test_plots_have_no_colours_but_the_pages(which: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(which)
    plots = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(plots) == (4 if which == "small" else 5)
    for plot in plots:
        assert not re.search(r"#[0-9a-fA-F]{6}\b", plot)
        assert "currentColor" in plot


def test_the_page_is_of_moderate_size(small: str, large: str) -> None:
    assert len(small.encode()) < 200_000
    assert len(large.encode()) < 1_500_000


def test_the_page_is_the_same_each_time(small: str) -> None:
    assert page(example(2, 4, preference=0.3).to_data()) == small


def test_advice_stands_before_the_plots(small: str) -> None:
    assert 0 < small.index("no better than chance") < small.index("<svg")
    assert "No problem was found." in Parsed(page(example(3, 1).to_data())).text


def test_plots_say_what_they_are_and_tables_have_their_numbers(small: str) -> None:
    parsed = Parsed(small)
    plots = [of for tag, of in parsed.elements if tag == "svg"]
    assert all(of["role"] == "img" and of["aria-label"] for of in plots)
    found = example(2, 4, preference=0.3)
    for share in found.layers[3].numbers.top1:
        assert f"{100 * share:.1f}" in parsed.said
    headings = [of.get("scope") for tag, of in parsed.elements if tag == "th"]
    assert set(headings) == {"row", "col"}


def test_plots_name_texts_as_tables_do() -> None:
    names = ["experts/python", "experts/medicine", 'a id="b_1" #010101']
    text = page(example(3, 2, names=names).to_data())
    plots = "".join(re.findall("<svg.*?</svg>", text, re.DOTALL))
    assert all(name in plots for name in names)


def test_cosines_that_are_nearly_nothing_have_no_sign() -> None:
    data = example(2, 2).to_data()
    data["overall"]["cosine"] = [[1.0, -0.004], [-0.004, 1.0]]
    assert "−0.00" not in page(data)


def test_shares_above_the_scale_of_a_plot_are_said_to_be_there() -> None:
    """An expert of eight that gets all tokens of a layer has the colour of one that gets half of them."""
    data = example(8, 2).to_data()
    assert "≥" not in page(data)
    data["layers"][0]["top1"] = [1.0] + [0.0] * 7
    assert "≥ 50 %" in page(data)


def test_long_tables_are_folded(small: str, large: str) -> None:
    assert 64 > MAX_OPEN_ROWS > 4
    for text, folded in ((small, 1), (large, 5)):
        assert [("open" in of) for tag, of in Parsed(text).elements if tag == "details"].count(False) == folded


def test_names_are_shown_and_never_obeyed() -> None:
    found = example(
        2,
        2,
        names=[HOSTILE, "b"],
        subject=HOSTILE,
        more_texts=[Text(HOSTILE, None, 70, True), Text("$\\frac{$", None, 9, True)],
    )
    text = page(found.to_data())
    text.encode()
    parsed = Parsed(text)
    assert not {"script", "img"} & {tag for tag, _ in parsed.elements}
    assert "<script>alert(1)</script>" in parsed.text
    assert "\x1b" not in text
    assert "\x00" not in text


@pytest.mark.parametrize(("experts", "layers", "k"), [(1, 1, 1), (2, 1, 2), (10, 3, 1), (11, 41, 3), (130, 5, 2)])
def test_every_size_has_a_page(experts: int, layers: int, k: int) -> None:
    assert Parsed(page(example(experts, layers, k).to_data())).text


def test_what_there_is_one_of_is_not_said_in_the_plural() -> None:
    text = Parsed(page(example(1, 1, 1).to_data())).text
    assert "1 expert, 1 per token, 1 layer, gate mode hidden. 200 tokens in 1 text, 200 of them held out." in text
    assert "of 1 layer " in text


def test_what_is_not_finite_has_a_page() -> None:
    data = example(3, 2).to_data()
    for numbers in (data["overall"], *data["layers"]):
        for key in ("agreement_top1", "agreement_topk", "entropy", "first_weight", "load_balance"):
            numbers[key] = None
        numbers["cosine"] = [[None] * 3] * 3
    assert Parsed(page(data)).text


def test_nothing_of_it_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, moeplan.cli\n"
        "early = [name for name in sys.modules if name.startswith('moeplan.routes')]\n"
        "import moeplan.routes.page, moeplan.routes.statistics, moeplan.routes.view\n"
        "print(early, [name for name in ('matplotlib', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[] []\n"


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'moeplan\[report\]'"):
        page(example().to_data())


def test_a_page_takes_no_place_of_what_is_to_be_routed(tmp_path: Path) -> None:
    config, story, model = tmp_path / "config.yml", tmp_path / "story.html", tmp_path / "model"
    prompts = tmp_path / "prompts.txt"
    for file in (config, story, prompts):
        file.touch()
    model.mkdir()
    (tmp_path / "link").symlink_to(model / "config.json")
    os.mkfifo(tmp_path / "fifo")
    for html, subject, message in (
        (config, config, "is what is to be routed; name another file"),
        (story, model, "is what is to be routed; name another file"),
        (model / "config.json", model, "is in the model's directory; name a file elsewhere, or one in .html"),
        (tmp_path / "link", model, "is in the model's directory; name a file elsewhere, or one in .html"),
        (tmp_path / "fifo", config, "is there, and no page; name one in .html, or a new file"),
        (prompts, config, "is there, and no page; name one in .html, or a new file"),
        (tmp_path / "link" / "page.html", config, f"there is no directory {tmp_path}/link; name a file in one"),
        (tmp_path / ("x" * 256), config, "File name too long"),
        (Path("/proc/page.html"), config, "No such file or directory"),
    ):
        with pytest.raises(UserError, match=re.escape(f"--html: {html}: {message}")) as refused:
            check_place(html, subject, [str(story)])
        assert refused.value.exit_status == 2
    for html in (model / "page.html", tmp_path / "report", tmp_path / "report.html"):
        check_place(html, model, [str(story)])
    names = ["config.yml", "fifo", "link", "model", "prompts.txt", "story.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_page_takes_the_place_of_another_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    html, link = tmp_path / "page.html", tmp_path / "link.html"
    html.write_text("old")
    link.symlink_to(html)
    with monkeypatch.context() as patch:
        patch.setattr("executor.files.os.pwrite", full)
        with pytest.raises(RunError, match=f"--html: {html}: the disk is full; free some space"):
            write_page(html, "new")
    assert html.read_text() == "old"
    write_page(link, "new")
    assert html.read_text() == "new"
    assert sorted(tmp_path.iterdir()) == [link, html]


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["small", "large"])
def test_chromium_shows_the_page_in_light_and_in_dark(
    which: str, scheme: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from PIL import Image  # matplotlib needs it, too

    (tmp_path / "page.html").write_text(request.getfixturevalue(which), encoding="utf-8")
    shot = tmp_path / "shot.png"
    done = subprocess.run(
        [
            str(CHROMIUM),
            *FLAGS,
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
            f"--screenshot={shot}",
            (tmp_path / "page.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    with Image.open(shot) as image:
        pixels = image.convert("RGB")
    paper = pixels.getpixel((2, 2))
    assert paper == ((20, 23, 26) if scheme == "dark" else (255, 255, 255))
    colours = pixels.getcolors(maxcolors=1 << 24)
    assert colours is not None
    assert len(colours) > 100
    drawn = sum(count for count, colour in colours if colour != paper) / (pixels.width * pixels.height)
    assert drawn > 0.1
