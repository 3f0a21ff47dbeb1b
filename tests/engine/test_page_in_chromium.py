"""The page of `mkdsl explain --html` in a real browser: that it is drawn, what the mouse and the keyboard do, and that nothing complains.

Without a Chromium these are skipped; `.ci/run` installs one.
"""

import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import chromium
import pytest
from chromium import Browser
from found import found
from oracle.graphs import tiny
from stamps import stamped

from mkdsl.engine._page import page
from mkdsl.schedule import profile
from mkdsl.simulate import Span, simulate

pytestmark = [
    pytest.mark.medium,
    pytest.mark.skipif(chromium.found() is None, reason="no Chromium here to look at the page with: apt-get install chromium"),
]
H200 = profile("h200")
NAME = "<img src=x onerror=hacked=1>"  # of a model: text, whatever it looks like


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    folder, schedule = tmp_path_factory.mktemp("pages"), found(tiny(), 3, H200)
    measured = stamped(tiny(), schedule, H200, 2.0)
    pages = {
        "predicted": page("tiny", tiny(), schedule, H200),
        "measured": page(NAME, tiny(), schedule, H200, measured=measured, device="NVIDIA H200", alternatives=False),
    }
    for name, html in pages.items():
        (folder / f"{name}.html").write_text(html, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in pages}


@pytest.fixture(scope="module")
def only_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium.browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def browser(only_browser: Browser) -> Iterator[Browser]:
    """Fails a test during which the page complained."""
    only_browser.complaints.clear()
    yield only_browser
    assert not only_browser.complaints


def span_of(phase: str, iteration: int) -> tuple[Span, int]:
    """A span that is predicted, and one of its workers."""
    played = simulate(tiny(), found(tiny(), 3, H200), H200, whole=True)
    span = next(s for s in played.spans if (s.phase, s.iteration) == (phase, iteration))
    return span, played.cohorts[span.cohort][0]


def place(browser: Browser, us: float, worker: int, view: int = 0) -> tuple[float, float]:
    """Where a worker is at a time, in the window."""
    box = browser.run(f"(({{left, top}}) => [left, top])(views[{view}].canvas.getBoundingClientRect())")
    x, y = browser.run(f"[views[{view}].x({1000 * us}), views[{view}].y({worker}) + views[{view}].rowHeight / 2]")
    return box[0] + x, box[1] + y


def colour_at(browser: Browser, us: float, worker: int) -> list[int]:
    """What is drawn there; the window shows one CSS pixel as one pixel."""
    where = f"views[0].canvas, views[0].x({1000 * us}), views[0].y({worker}) + 1, 1, 1, 0, 0, 1, 1"
    script = f"((c) => (c.drawImage({where}), [...c.getImageData(0, 0, 1, 1).data]))(new OffscreenCanvas(1, 1).getContext('2d'))"
    return browser.run(script)[:3]


def colour_of(browser: Browser, phase: str) -> list[int]:
    return browser.run(f"rgb(getComputedStyle(document.documentElement).getPropertyValue('--p{list(tiny().order).index(phase)}').trim())")


def shown(browser: Browser) -> tuple[float, float]:
    """Of the step, in microseconds."""
    first, last = browser.run("[view.from / 1000, view.to / 1000]")
    return first, last


def tip(browser: Browser) -> str | None:
    text = browser.run("by('tip').hidden ? null : by('tip').innerText")
    return text and text.replace("\xa0", " ")


def alike(one: Any, other: Any) -> bool:
    return all(abs(a - b) <= 2 for a, b in zip(one, other, strict=True))


def test_what_goes_wrong_in_a_page_is_noticed(only_browser: Browser, tmp_path: pathlib.Path):
    """Each of these, or no other test here means anything."""
    for script in (
        "console.error('no')",
        "setTimeout(() => { throw new Error('no') })",
        "fetch('https://localhost:9/').catch(() => 0)",
        "nothing.at.all",
    ):
        only_browser.complaints.clear()
        (tmp_path / "bad.html").write_text(f"<!doctype html><script>{script}</script>", encoding="utf-8")
        only_browser.open(tmp_path / "bad.html")
        only_browser.run("new Promise((done) => setTimeout(done, 50))")
        assert only_browser.complaints, script


def test_summary_and_tables_are_there(browser: Browser, files: dict[str, pathlib.Path]):
    browser.open(files["predicted"])
    schedule = found(tiny(), 3, H200)
    assert browser.run("document.title") == "tiny on h200: mkdsl explain"
    tiles = browser.run("[...document.querySelectorAll('.tile')].map((t) => t.innerText)")
    assert len(tiles) == 4 and f"{schedule.predicted_us:.0f} µs" in tiles[0] and "of 227 KiB" in tiles[2]
    rows = browser.run("['phases', 'plan', 'tensors', 'second'].map((id) => by(id).tBodies[0].rows.length)")
    assert rows[:3] == [len(schedule.phases), len(schedule.phases), len(schedule.tensors)] and rows[3] > 6
    assert browser.run("document.querySelectorAll('.memory .track').length") == len(schedule.phases)
    assert browser.run("by('second-section').hidden") is False


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_timeline_is_drawn(browser: Browser, files: dict[str, pathlib.Path], scheme: str):
    """A fold in its phase's colour, waiting in a pale one, and colours of the scheme all around."""
    browser.open(files["predicted"], scheme=scheme)
    browser.run("showWhole()")
    browser.settle()
    for phase, iteration in (("wq+wk+wv", 2), ("wg·wu", 1), ("wd", 4), ("embed", 0)):
        span, worker = span_of(phase, iteration)
        browser.run(f"show({1000 * span.arrived}, {1000 * span.signalled})")
        browser.settle()
        assert alike(colour_at(browser, (span.read + span.folded) / 2, worker), colour_of(browser, phase)), phase
        if span.known > span.arrived:
            assert not alike(colour_at(browser, (span.arrived + span.known) / 2, worker), colour_of(browser, phase))
    background = browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(background) > 600) == (scheme == "light")


def test_colours_follow_the_scheme_while_it_is_open(browser: Browser, files: dict[str, pathlib.Path]):
    browser.open(files["predicted"], scheme="light")
    span, worker = span_of("embed", 0)
    before = colour_of(browser, "embed")
    browser.prefer("dark")
    browser.settle()
    browser.run("showWhole()")
    browser.settle()
    after = colour_at(browser, (span.read + span.folded) / 2, worker)
    assert alike(after, colour_of(browser, "embed")) and not alike(before, after)


def test_the_mouse_finds_what_an_sm_does(browser: Browser, files: dict[str, pathlib.Path]):
    browser.open(files["predicted"])
    browser.run("showWhole()")
    browser.settle()
    span, worker = span_of("wo", 3)
    assert tip(browser) is None
    browser.mouse("mouseMoved", *place(browser, (span.arrived + span.signalled) / 2, worker))
    text = tip(browser)
    assert text is not None and text.startswith("wo, iteration 3 of 5\n")
    assert f"SM {worker}: starts at {span.arrived:.2f} µs, lasts {span.signalled - span.arrived:.2f} µs" in text
    took = [f"{b - a:.2f} µs" for a, b in itertools.pairwise(span[3:])]
    assert [line for line in text.splitlines() if line.startswith(("wait\t", "read", "fold", "epilogue"))] == [
        f"{name}\t{t}" for name, t in zip(("wait", "read", "fold", "epilogue"), took, strict=True)
    ]
    attention = max(
        s.signalled for s in simulate(tiny(), found(tiny(), 3, H200), H200, whole=True).spans if (s.phase, s.iteration) == ("attention", 3)
    )
    assert f"waits for attention 3: its last signal comes at {attention:.2f} µs" in text
    browser.mouse("mouseMoved", 5, 5)
    assert tip(browser) is None


def test_a_hand_off_is_drawn_to_what_the_mouse_is_on(browser: Browser, files: dict[str, pathlib.Path]):
    browser.open(files["predicted"])
    browser.run("showWhole()")
    browser.settle()
    span, worker = span_of("wd", 2)
    plain = browser.run("views[0].canvas.toDataURL()")
    browser.mouse("mouseMoved", *place(browser, (span.read + span.folded) / 2, worker))
    assert browser.run("views[0].canvas.toDataURL()") != plain
    browser.mouse("mouseMoved", 5, 5)
    assert browser.run("views[0].canvas.toDataURL()") == plain


def test_the_wheel_zooms_about_the_pointer_with_ctrl_only(browser: Browser, files: dict[str, pathlib.Path]):
    browser.open(files["predicted"])
    browser.run("showWhole()")
    browser.settle()
    whole = shown(browser)
    x, y = place(browser, whole[1] / 4, 60)
    browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-240)
    assert shown(browser) == whole
    x, y = place(browser, whole[1] / 4, 60)  # the page may have scrolled
    browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-240, modifiers=2)
    first, last = shown(browser)
    assert last - first == pytest.approx((whole[1] - whole[0]) / 2.718, rel=0.02)
    assert first == pytest.approx(whole[1] / 4 * (1 - 1 / 2.718), rel=0.03)
    browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=2400, modifiers=2)
    assert shown(browser) == whole


def test_dragging_moves_and_a_double_click_zooms_in(browser: Browser, files: dict[str, pathlib.Path]):
    browser.open(files["predicted"])
    first, last = shown(browser)
    (x, y), (further, _) = place(browser, (first + last) / 2, 60), place(browser, first + 0.75 * (last - first), 60)
    browser.mouse("mousePressed", x, y, button="left", buttons=1, clickCount=1)
    browser.mouse("mouseMoved", further, y, button="left", buttons=1)
    browser.mouse("mouseReleased", further, y, button="left", clickCount=1)
    assert shown(browser) == pytest.approx((first - (last - first) / 4, last - (last - first) / 4), abs=0.05)
    for count in (1, 2):
        for kind in ("mousePressed", "mouseReleased"):
            browser.mouse(kind, x, y, button="left", clickCount=count)
    assert shown(browser)[1] - shown(browser)[0] == pytest.approx((last - first) / 3, rel=0.02)


def test_keys_and_buttons(browser: Browser, files: dict[str, pathlib.Path]):
    browser.open(files["predicted"])
    browser.run("views[0].canvas.focus()")
    browser.press("0")
    whole = shown(browser)
    assert whole == (0, pytest.approx(simulate(tiny(), found(tiny(), 3, H200), H200, whole=True).us, abs=0.01))
    browser.press("+")
    assert shown(browser)[1] - shown(browser)[0] == pytest.approx(whole[1] / 1.5)
    before = shown(browser)
    browser.press("ArrowRight")
    assert shown(browser)[0] > before[0]
    browser.run("by('out').click(); by('out').click()")
    browser.settle()
    assert shown(browser) == whole
    browser.run("by('iteration').click()")
    browser.settle()
    names = browser.run(
        "steps.map((s, at) => [label(s), views[0].timeline.lane[at]]).filter(([, [a, b]]) => a >= view.from && b <= view.to).map((s) => s[0])"
    )
    assert names == ["wq+wk+wv 2", "attention 2", "wo 2", "wg·wu 2", "wd 2"]


def test_the_overview_moves_the_view(browser: Browser, files: dict[str, pathlib.Path]):
    browser.open(files["predicted"])
    first, last = shown(browser)
    left, top, width = browser.run("(({left, top, width}) => [left, top, width])(by('overview').getBoundingClientRect())")
    browser.mouse("mousePressed", left + width - 3, top + 10, button="left", buttons=1, clickCount=1)
    browser.mouse("mouseReleased", left + width - 3, top + 10, button="left", clickCount=1)
    assert shown(browser)[1] == pytest.approx(browser.run("total / 1000")) and shown(browser)[0] > last - first


def test_what_was_measured_stands_below(browser: Browser, files: dict[str, pathlib.Path]):
    """Aligned at the iteration that both show; the name of a model is text and no markup."""
    browser.open(files["measured"], height=1200)
    assert browser.run("by('title').textContent") == f"{NAME} on h200" and browser.run("typeof hacked") == "undefined"
    assert browser.run("[...document.querySelectorAll('.view-title')].map((t) => t.innerText)") == [
        "Predicted",
        "Measured by the kernel's own stamps, NVIDIA H200",
    ]
    starts = browser.run(f"views.map((v) => v.x(v.timeline.lane[stepOf.get('{list(tiny().order).index('wq+wk+wv')} 2')][0]))")
    assert starts[0] == pytest.approx(starts[1])
    span, worker = span_of("wo", 2)
    browser.mouse("mouseMoved", *place(browser, 2 * (span.read + span.folded) / 2 - 0.01, worker, view=1))
    text = tip(browser)
    assert text is not None and text.startswith("wo, iteration 2 of 5\n")
    assert f"predicted: starts at {span.arrived:.2f} µs, lasts {span.signalled - span.arrived:.2f} µs" in text
    assert browser.run("by('second-section').hidden") is True


def test_shared_memory_says_what_each_part_is(browser: Browser, files: dict[str, pathlib.Path]):
    browser.open(files["predicted"], height=2600)
    schedule = found(tiny(), 3, H200)
    x, y = browser.run("(({left, top}) => [left + 40, top + 8])(document.querySelector('.memory .track i').getBoundingClientRect())")
    browser.mouse("mouseMoved", x, y)
    kib = schedule.stage_bytes // 1024
    assert tip(browser) == f"ring: {schedule.num_stages} × {kib} KiB = {schedule.num_stages * kib} KiB"


def test_nothing_sticks_out_of_a_narrow_window(browser: Browser, files: dict[str, pathlib.Path]):
    for name in files:
        browser.open(files[name], width=400)
        assert browser.run("document.documentElement.scrollWidth") <= 400
