"""The page of a server in a real browser, with the server in a thread."""

import re

import numpy as np
import pytest
from playwright.sync_api import expect
from serving import running, wait_until

from cellstack import CellSpec, Network
from cellstack.nodes import Bidirectional, Cell, Recurrent
from cellstack.serve import Limits

WIDTH, H = 3, 12


def cell(width, units):
    new, spec = np.random.default_rng(0).standard_normal, CellSpec(width, units)
    return Cell(spec, **{name: (0.5 * new(shape)).astype(np.float32) for name, shape in spec.shapes.items()})


def serving(folder, **settings):
    """Serve three models."""
    networks = {
        "both_ways": Network(
            [Bidirectional(Recurrent((cell(WIDTH, 2),)), Recurrent((cell(WIDTH, 2),), go_backwards=True))]
        ),
        "states": Network([Recurrent((cell(WIDTH, H),))]),
        "voice": Network([Recurrent((cell(160, 4),))], ["an_output_whose_name_is_wider_than_a_small_screen"]),
    }
    for name, network in networks.items():
        network.save(folder / f"{name}.safetensors")
    return running(*(folder / f"{name}.safetensors" for name in networks), limits=Limits(sessions=8), **settings)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("models")) as server:
        yield server


@pytest.fixture(scope="module")
def page(browser):
    """A page that the tests share: a new one takes a second of processor time."""
    page = browser.new_context().new_page()
    page.set_default_timeout(60_000)
    return page


@pytest.fixture
def screen(page, server):
    """Open the page; at the end, the browser must have reported no errors but those that contain an expected text."""
    said, allowed = [], []
    listeners = {
        "console": lambda message: said.append(message.text),
        "pageerror": lambda error: said.append(str(error)),
    }

    def opened(url=server.http, width=1200, scheme="light", expected=()):
        allowed.extend(expected)
        for event, listener in listeners.items():
            page.on(event, listener)
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.goto(url)
        page.wait_for_selector("[data-model], form, .warning")
        return page

    yield opened
    page.goto("about:blank")
    page.context.clear_cookies()
    for event, listener in listeners.items():
        page.remove_listener(event, listener)
    assert [text for text in said if not any(part in text for part in allowed)] == []


def session_of(server, name):
    (session,) = server.models.model(name).sessions.values()
    return session


def answered(page, frame):
    """Wait for the answer to a frame: its number, or a pattern."""
    expected = frame if isinstance(frame, re.Pattern) else str(frame)
    expect(page.locator("[data-figure=frame]")).to_have_text(expected, timeout=60_000)


def end(page, server, name):
    """End the page's session, so that the next test finds none."""
    page.get_by_role("button", name="New session").click()
    answered(page, 0)
    wait_until(lambda: not server.models.model(name).sessions)


@pytest.mark.long
def test_frames_from_sliders_are_answered_as_by_a_stream(screen, server):
    page = screen()
    assert page.locator("[data-model=states]").get_attribute("aria-pressed") == "true"  # the first with sessions
    assert "x [3] → layer_0 [12]" in page.locator("[data-model=states]").inner_text()
    page.get_by_role("slider", name="x 1").fill("1.5")
    for frame in (1, 2):
        page.get_by_role("button", name="Send one").click()
        answered(page, frame)
    stream = server.models.model("states").network.stream()
    expected = [stream.step(np.array([[0, 1.5, 0]], np.float32)) for _ in range(2)][-1][0]
    texts = page.evaluate("[...document.querySelectorAll('.values span')].map((one) => one.innerText)")  # in one call
    shown = [text.split(": ")[1].replace("−", "-") for text in texts]
    np.testing.assert_allclose(np.array(shown, float), expected[:8], rtol=1e-3)
    page.get_by_role("combobox", name="Lines of outputs").select_option("8")
    assert page.locator(".values span").count() == 4
    end(page, server, "states")


@pytest.mark.long
def test_a_generated_signal_runs_until_it_is_stopped(screen, server):
    page = screen(scheme="dark", width=390)
    page.get_by_role("button", name="Signal").click()
    page.get_by_label("Frames per second").fill("100")
    page.get_by_role("button", name="Start").click()
    answered(page, re.compile(r"[1-9]\d"))
    page.get_by_role("button", name="Stop").click()
    assert page.locator("[data-figure=median]").inner_text().endswith(" ms")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    painted = page.evaluate(
        "(c) => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size",
        page.locator("canvas.chart").first.element_handle(),
    )
    assert painted > 10
    end(page, server, "states")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b,c\n1,2,3\n4,5,6\n", "rows.csv: 2 rows"),
        ("1;2;3\n", "rows.csv: 1 row"),
        ("1,2,3\n4,5\n", "row 2: expected 3 numbers, got 2"),
        ("1,2,3\n4,x,6\n", "row 2: expected numbers, got x"),
        ("", "expected at least one row of numbers"),
    ],
)
def test_the_rows_of_a_file(text, expected, screen, server):
    page = screen()
    page.get_by_role("button", name="CSV").click()
    page.get_by_label("File").set_input_files({"name": "rows.csv", "mimeType": "text/csv", "buffer": text.encode()})
    page.get_by_text(expected).wait_for()
    start = page.get_by_role("button", name="Start")
    if not expected.startswith("rows.csv"):
        assert start.is_disabled()
        return
    start.click()
    answered(page, expected.split()[1])
    end(page, server, "states")


@pytest.mark.long
def test_audio_is_cut_into_frames_of_the_width(screen, server):
    page = screen(width=390)
    page.locator("[data-model=voice]").click()
    page.get_by_role("button", name="Audio").click()
    page.get_by_label("Samples per second").fill("16000")
    samples = (3000 * np.sin(np.arange(4000))).astype("<i2").tobytes()  # half a second at 8 kHz
    size = len(samples).to_bytes(4, "little")
    form = bytes.fromhex("10000000 0100 0100 401f0000 803e0000 0200 1000")
    total = (36 + len(samples)).to_bytes(4, "little")
    wave = b"RIFF" + total + b"WAVEfmt " + form + b"data" + size + samples
    page.get_by_label("File").set_input_files({"name": "a.wav", "mimeType": "audio/wav", "buffer": wave})
    page.get_by_text("a.wav: 0.5 seconds, 50 frames").wait_for()
    assert page.get_by_label("Frames per second").input_value() == "100"
    page.get_by_role("button", name="Start").click()
    answered(page, 50)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    end(page, server, "voice")


def test_values_that_are_not_numbers(screen):
    page = screen()
    page.locator("[data-model=voice]").click()
    page.get_by_label("Values").fill("1, 2, x")
    page.get_by_role("button", name="Send one").click()
    page.get_by_text("expected numbers, got x").wait_for()


def test_a_model_without_sessions_says_why(screen):
    page = screen()
    page.locator("[data-model=both_ways]").click()
    assert "both_ways has no sessions: " in page.locator(".warning").inner_text()


def test_a_session_that_the_server_closes(screen, server):
    page = screen()
    page.get_by_role("button", name="Start").click()
    answered(page, re.compile(r"[1-9]"))
    session = session_of(server, "states")
    server.call(session.model.close(session))
    page.get_by_text("the session was closed; the next frame begins a new session").wait_for()
    page.get_by_role("button", name="Start").wait_for()


@pytest.mark.long
def test_a_server_that_stops(screen, tmp_path):
    with serving(tmp_path) as server:
        page = screen(server.http, expected=["ERR_CONNECTION_REFUSED"])
        page.get_by_role("button", name="Start").click()
        answered(page, re.compile(r"[1-9]"))
    page.get_by_text("the server is stopping").wait_for()
    page.get_by_role("button", name="Start").click()
    page.get_by_text("the server can't be reached, or refuses the connection").wait_for()


@pytest.mark.long
def test_a_server_with_tokens(screen, tmp_path):
    with serving(tmp_path, tokens=("the-right-token",)) as server:
        page = screen(server.http, expected=["401"])
        for token in ("wrong", "the-right-token"):
            page.get_by_label("Token").fill(token)
            page.get_by_role("button", name="Continue").click()
            page.wait_for_selector(".warning" if token == "wrong" else "[data-model]")
        page.get_by_role("button", name="Send one").click()
        answered(page, 1)
        page.get_by_role("button", name="New session").click()
