"""core/page.py: the report as one page, looked at in Chromium as a person would; and what hostile text does to it."""

import html.parser
import os
import re
from pathlib import Path
from typing import Any

import pytest
from browser import browser, missing
from conftest import Call

from core.metrics import plain_label, val_gap
from core.page import MOST_POINTS, thinned, write_page

NASTY = "</pre></script><script>document.title = 'owned'</script><img src=x onerror=document.title='owned'> {{data}} " \
        "\x00\x1b[31m \u202eabc &lt; ' \" \ud800 \u2028"


def records(shift: float, steps: int = 2000) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for step in range(0, steps + 1, 10):
        loss = 1.5 + shift + 3 / (1 + step / 100)
        found.append({"step": step, **({"train_loss": loss - 0.1} if step else {}),
                      **({"val_loss": loss} if step % 250 == 0 else {})})
    return found


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Of two runs, of which everything that is text is hostile."""
    path = tmp_path / "page.html"
    write_page(path, f"a {NASTY}", NASTY, f"python compare.py '{NASTY}'", {"one": records(0), NASTY: records(0.05)},
               True, [["", "one", NASTY], [f"loss {NASTY}", "1.5", "1.6"]], {"one": "Fine.", NASTY: NASTY},
               {"one": {"lr": 1e-3, "seed": 1}, NASTY: {"lr": 2e-3, "seed": 1, NASTY: NASTY}})
    return path


class Elements(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_text_stays_text_and_nothing_is_asked_for_outside(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    elements = Elements()
    elements.feed(content)
    assert [tag for tag, _ in elements.found if tag in ("script", "img", "link", "iframe", "object")] == ["script"] * 2
    attributes = {name for _, attrs in elements.found for name in attrs}
    assert not any(name in ("src", "href", "action", "style") or name.startswith("on") for name in attributes)
    assert re.findall(r"(?:https?:)?//[\w.]+", content) == ["http://www.w3.org"]  # the name of SVG
    assert "\x00" not in content and "\x1b" not in content and "{{style" not in content


def test_long_curves_are_thinned() -> None:
    steps, values = thinned(list(range(10, 70_010, 10)), [float(i) for i in range(7000)])
    assert len(steps) == 1750 <= MOST_POINTS and (steps[0], values[0]) == (40, 1.5) and steps[-1] == 70_000
    assert thinned([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0]) and thinned([], []) == ([], [])


def brightness(color: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / 765


@pytest.mark.skipif(bool(missing()) and not os.environ.get("CI"),
                    reason=f"{' and '.join(missing())} not found (Debian: apt-get install chromium chromium-driver)")
def test_in_a_browser(page: Path, trained: dict[str, Path], tmp_path: Path, call: Call) -> None:
    """Pointer, keys, a narrow window, light and dark; no script of a stranger runs, and nothing goes outside."""
    values = "return document.querySelector('figure .values').textContent"
    with browser() as window:
        window.look(page, 1000)
        assert window.run("return document.title").startswith("a </pre></script>")
        assert window.run("return document.querySelectorAll('#chart0 path').length") == 4
        assert window.run("return document.querySelectorAll('#chart1 path').length") == 1
        assert "step 2,000" in window.run(values) and "1.6429" in window.run(values)  # the last ones
        window.point("#chart0", 0.5)
        first = window.run(values)
        assert re.match("step 9[0-9]0one training 1[.].*validation 1[.]", first, re.DOTALL), first
        window.point("#chart0", 0.8)
        assert re.match("step 1,[56]", window.run(values)), window.run(values)
        window.point("h1", 0.5)
        assert "step 2,000" in window.run(values)  # when the pointer has left
        window.run("document.querySelector('#chart0').focus()")
        window.press("\ue012", "\ue012")  # left
        assert "step 1,980" in window.run(values)
        window.press("\ue011")  # home
        assert "step 0" in window.run(values) and "training -" in window.run(values)
        spoken = window.run("return document.activeElement.getAttribute('aria-valuetext')")
        assert spoken.startswith("step 0, one training -, one validation 4.5000")
        back = {}
        for dark in (False, True):
            for width in (1000, 340):
                window.look(page, width, dark)
                assert window.run("return document.documentElement.scrollWidth") <= width
                assert window.run("return document.querySelector('#chart0').clientWidth") > width * 0.8
                ink, back[dark] = window.run("const s = getComputedStyle(document.body); return [s.color, "
                                             "s.backgroundColor]")
                assert abs(brightness(ink) - brightness(back[dark])) > 0.6
        assert brightness(back[False]) > 0.9 and brightness(back[True]) < 0.2
        assert window.run("return document.title") != "owned" and window.complaints() == []
        # and what compare.py itself writes
        assert call("compare", trained["gpt"], trained["bitgpt"], "--out-dir", tmp_path / "report").code == 0
        window.look(tmp_path / "report" / "comparison.html")
        assert window.run("return document.querySelectorAll('figure').length") == 2
        assert "bitgpt validation" in window.run(values) and window.complaints() == []
        shown = window.run("return document.body.innerText")
        assert f"python compare.py {trained['gpt']} {trained['bitgpt']} --out-dir" in shown and "n_embd" in shown


def test_the_gap_is_second_minus_first() -> None:
    one, two = ([{"step": 0, "val_loss": a}, {"step": 2}, {"step": 4, "val_loss": b}] for a, b in ((3, 2), (4, 1)))
    assert val_gap(one, two) == ([0, 4], [1, -1]) and plain_label("_a$b") == r" _a\$b"
