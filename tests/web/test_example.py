"""The example that streams a microphone, played from a file in Chromium."""

import os
import re
import shutil
import subprocess
import sys
import wave

import numpy as np
import pytest
import tools
from javascript import PACKAGE

from cellstack import load

pytestmark = pytest.mark.web
EXAMPLE = PACKAGE.parent / "example"


def tone(frequency, seconds, rate):
    return 0.2 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)


def write_sound(path, rate=48_000):
    """Write two seconds each of noise, a whistle and noise."""
    rng = np.random.default_rng(0)
    parts = [np.zeros(2 * rate), tone(1500, 2, rate), np.zeros(2 * rate)]
    sound = np.concatenate(parts) + rng.normal(0, 0.003, 6 * rate)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((sound * 32767).astype("<i2").tobytes())


def test_the_example_hears_a_whistle(site, tmp_path):
    """A file as the microphone; the page's probabilities, its text, and a picture of it."""
    from playwright.sync_api import sync_playwright

    folder, address = site
    shutil.copytree(EXAMPLE, folder / "example", dirs_exist_ok=True)
    model = folder / "example" / "whistle.safetensors"
    subprocess.run([sys.executable, EXAMPLE / "train.py", model], check=True, timeout=300)
    assert load(model).input_size == 32
    sound = tmp_path / "sound.wav"
    write_sound(sound)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=tools.chromium(playwright),
            args=[
                "--no-sandbox",
                "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream",
                f"--use-file-for-fake-audio-capture={sound}%noloop",
                "--autoplay-policy=no-user-gesture-required",
            ],
        )
        page = chromium.new_page(viewport={"width": 900, "height": 520})
        problems = []
        page.on("pageerror", lambda error: problems.append(error))
        page.goto(f"{address}/example/index.html")
        page.click("button")
        probabilities = "import('./app.js').then(({ probabilities }) => [...probabilities])"
        for _ in range(150):  # the sound takes six seconds
            page.wait_for_timeout(200)
            if len(page.evaluate(probabilities)) > 330:
                break
        found = np.array(page.evaluate(probabilities))
        page.screenshot(path=os.environ.get("CELLSTACK_SCREENSHOT", tmp_path / "whistle.png"))
        state, time = page.inner_text("output"), page.inner_text("#time")
        chromium.close()
    assert not problems
    assert state in ("a whistle", "no whistle")
    assert re.fullmatch(r"A step and its features take \d+ µs\.", time)
    heard = np.flatnonzero(found[10:] > 0.5)  # the first frames have the click of a microphone that starts
    # two seconds are 100 frames; a busy machine may lose some of the sound
    assert 60 <= len(heard) <= 110, f"heard {len(heard)} of {len(found)} frames: {heard}"
    assert heard[-1] - heard[0] < 120, f"expected one whistle, heard frames {heard}"
