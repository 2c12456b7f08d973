"""screen/report.py: what it reads from a run's files, and its page in a browser (Chromium, if it is installed)."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
import urllib.request

import pytest
import yaml
from helpers import ROOT, write

from screen import report
from settings.errors import UserError
from tools import report as command

NASTY = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 1'>\u2028{{ 7 * 6 }}"


def make_run(directory, steps=60, text="你好 🙂", **config):
    """Write an output directory like sft.py's. The loss falls from 3 to 1; step 40 has a spike."""
    os.makedirs(directory / "checkpoints")
    with open(directory / "metrics.jsonl", "w", encoding="utf-8") as f:
        for step in range(1, steps + 1):
            spike = 5.0 if step == 40 else 0.0
            line = {"step": step, "epoch": step / 20, "loss": 1 + 2 * (1 - step / steps) + spike,
                    "lr": 1e-3 * step / steps, "grad_norm": 1.0 + 10 * spike, "tokens": 100, "target_tokens": 50,
                    "seconds": 0.5, "tokens_per_second": 200.0, "peak_memory_gb": 1.5}
            f.write(json.dumps(line) + "\n")
            if step % 20 == 0:
                f.write(json.dumps({"step": step, "val_loss": 2.0 + abs(step - 40), "val_tokens": 9}) + "\n")
    samples = [{"step": step, "kind": "sample", "prompt": f"prompt {text}", "answer": f"answer {step} {text}"}
               for step in (20, 40, 60)]
    samples += [{"step": step, "kind": kind, "loss": 0.5, "target_tokens": 12, "source": f"data/x.json[3] {text}",
                 "text": f"{kind} {text}"} for step in (40, 60) for kind in ("worst", "best")]
    (directory / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    (directory / "ledger.json").write_text(json.dumps({"model": "model    tiny", "train": ["rows     9 in"],
                                                       "validation": []}))
    (directory / "config.yaml").write_text(yaml.safe_dump({"model": "tiny", "run_name": None, **config}))
    return directory


def make_full_run(directory, steps=200, **config):
    """A run with all that a page can show: two validation sets, three sources, resumes, MFU, losses that are near."""
    os.makedirs(directory / "checkpoints")
    lines = []
    for step in range(steps + 1):
        if step % 50 == 0:
            sets = {"math": {"loss": 2 - step / 200, "accuracy": 0.5 + step / 800, "tokens": 1200,
                             "forgetting": -step / 200},
                    "general knowledge": {"loss": 1 + step / 800, "accuracy": 0.7 - step / 2000, "tokens": 34_567,
                                          "forgetting": step / 800}}
            lines.append({"step": step, "val_loss": 1.5 - step / 800, "val_accuracy": 0.6, "val_tokens": 35_767,
                          "forgetting": -step / 800, "val_sets": sets})
        if step:
            sources = {"gsm8k": {"loss": 2 - step / 200 + step % 3 / 20, "target_weight": 30.0}}
            if step % 2:
                sources["data/chat.jsonl"] = {"loss": 1.5 - step / 400, "target_weight": 20.0}
            if step % 3 == 0:
                sources["other"] = {"loss": 1.0 + step % 5 / 10, "target_weight": 1.0}
            lines.append({"step": step, "epoch": step / 50, "loss": 2 - step / 200 + step % 7 / 30, "lr": 1e-4,
                          "grad_norm": 1.0 + step % 5 / 5, "tokens": 12_345, "target_tokens": 9000, "seconds": 2.0,
                          "tokens_per_second": 12_345.0 + step % 9 * 100, "peak_memory_gb": 61.3, "mfu": 0.4,
                          "accuracy": 0.5 + step / 600, "sources": sources})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    losses = {"worst": [3.1, 1.2349, 1.2345, 1.2345], "best": [0.1, 0.10004, 0.2]}
    samples = [{"step": 200, "kind": kind, "loss": loss, "target_tokens": 12, "source": f"data/x.json[{i}]",
                "text": f"{kind} {i} " + "word " * 60} for kind in losses for i, loss in enumerate(losses[kind])]
    samples += [{"step": step, "kind": "sample", "prompt": "What is it?", "answer": "An answer. " * 20}
                for step in (100, 200)]
    (directory / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (directory / "ledger.json").write_text(json.dumps({
        "model": "model    tiny (qwen2): 1,050,752 parameters", "train": ["rows     72 in = 72 trained + 0 dropped"],
        "validation": [], "resumes": [60, 120]}))
    config = {"model": "Qwen/Qwen2.5-0.5B", "train_data": "math=gsm8k.json,data/chat.jsonl", "run_name": None,
              "keep_best": "general knowledge", "lr": 1e-4, **config}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory


def test_a_run_that_has_just_started(tmp_path):
    """metrics.jsonl alone, empty; then with NaN, an incomplete line and an incomplete character."""
    (tmp_path / "metrics.jsonl").write_text("")
    assert report.write(tmp_path) == str(tmp_path / "report.html")
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": NaN}\n{"step": 2, "loss": 2.5}\n{"step": 3,\xe4')
    (tmp_path / "config.yaml").write_text("model: 'ti")
    report.write(tmp_path)
    run = report.Run(tmp_path)
    assert run.curves()["train"]["loss"] == [None, 2.5]
    assert run.summary()[1][1] == "2.5000"
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "metrics.jsonl", "report.html"]  # no temporary file


LAUGHS = "a: &a {x: 1}\n" + "\n".join(f"{b}: &{b} {{x: *{a}, y: *{a}}}" for a, b in zip("abcdefgh", "bcdefghi"))


@pytest.mark.parametrize("name, content", [
    ("config.yaml", LAUGHS), ("config.yaml", "- a"), ("config.yaml", "[" * 5000), ("config.yaml", "model: {a: [1]}"),
    ("samples.jsonl", '{"step": 1, "text": "no kind"}\n5\n{"kind": "worst", "step": 60}\n{"kind": ["x"]}\n'),
    ("samples.jsonl", "[" * 100_000 + "\n"),
    ("ledger.json", '{"model": 7, "train": "x", "ranks": "many"}'), ("ledger.json", "[" * 100_000),
    ("metrics.jsonl", '5\n{"step": "x", "loss": "y"}\n{"step": 1, "loss": [1], "tokens": "many", "seconds": {}}\n'
                      '{"val_loss": 1}\n{"step": 2, "val_loss": "low"}\n{"step": 3, "loss": 1e999}\n')])
def test_a_damaged_file_ends_nothing(name, content, tmp_path):
    """Neither the report nor, as it is written at each checkpoint, the run."""
    run = make_run(tmp_path / "run")
    (run / name).write_text(content)
    report.build([str(run), str(make_run(tmp_path / "whole"))], tmp_path / "both.html")
    assert len(report.write(str(run))) < 300


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "config.yaml", "ledger.json"])
def test_a_pipe_in_a_run_is_not_opened(name, tmp_path):
    """It would block for ever."""
    run = make_run(tmp_path / "run")
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    if name == "metrics.jsonl":
        with pytest.raises(UserError, match="is not a run: it has no metrics.jsonl"):
            report.write(run)
    else:
        report.write(run)


def test_only_a_report_is_overwritten(tmp_path):
    run = make_run(tmp_path / "run")
    metrics = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="metrics.jsonl exists and is not a report"):
        report.build([str(run)], str(run / "metrics.jsonl"))
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert report.write(str(run)) == report.write(str(run))


@pytest.mark.parametrize("ranks, start", [(None, "python sft.py"), (1, "python sft.py"),
                                          (4, "bash train.sh --n_gpus 4")])
def test_how_to_resume(tmp_path, ranks, start, monkeypatch):
    """The command has the run's number of ranks; a run of an earlier version has not recorded it."""
    monkeypatch.setattr("settings.venv.command", lambda file: f"python {file}")
    monkeypatch.chdir(ROOT)
    directory = make_run(tmp_path / "run")
    if ranks:
        ledger = json.loads((directory / "ledger.json").read_text())
        (directory / "ledger.json").write_text(json.dumps({**ledger, "ranks": ranks}))
    report.write(directory)
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert f"<code>{start} --config {directory}/config.yaml --resume_from auto</code>" in page


def test_sets_sources_forgetting_and_resumes(tmp_path):
    """What the page reads of the lines of a run; a run without them has neither their charts nor their tiles."""
    run = report.Run(make_full_run(tmp_path / "full"))
    assert run.judged_set() == "general knowledge" and run.lowest("math") == (200, 1.0)
    assert run.lowest("general knowledge") == (50, 1.0625)  # step 0 is lower, but nothing was trained then
    assert [run.forgetting(name) for name in (None, "math", "general knowledge")] == [-0.25, -1.0, 0.25]
    figures = {label: (value, note) for label, value, note in report.tiles([run])[0]}
    assert figures["Forgetting"] == ("+0.2500", "val_loss since step 0, general knowledge")
    assert figures["Best val_loss"] == ("1.0625", "after step 50 of general knowledge")
    assert figures["MFU"] == ("40%", "median")
    curves = run.curves()
    assert curves["resumes"] == {"step": [60, 120], "tokens": [60 * 12_345, 120 * 12_345], "seconds": [120, 240]}
    assert curves["val"]["sets"]["math"]["loss"] == [2.0, 1.75, 1.5, 1.25, 1.0]
    assert list(curves["sources"]) == ["gsm8k", "data/chat.jsonl", "other"]
    assert curves["sources"]["other"]["weight"][:4] == [0, 0, 1, 0]  # not in each step
    plain = report.Run(make_run(tmp_path / "plain"))
    assert not any(plain.has(name) for name in report.OPTIONAL) and all(
        run.has(name) for name in ("sources", "val_sets", "forgetting", "accuracy", "mfu"))
    assert len(report.tiles([plain])[0]) == 6 and [len(row) for row in report.tiles([plain, run])] == [8, 8]
    page = open(report.write(plain.directory), encoding="utf-8").read()
    assert page.count("data-curve=") == 5 and "Resumed after" not in page
    page = open(report.write(run.directory), encoding="utf-8").read()
    assert page.count("data-curve=") == 10 and "Resumed after steps" in page


def test_the_losses_of_a_source_in_a_thinned_run_cover_all_steps(tmp_path):
    run = report.Run(make_full_run(tmp_path / "run", steps=9000))
    for name, losses in run.sources.items():
        curve = run.curves()["sources"][name]
        assert len(curve["mean"]) == len(run.curves()["train"]["step"]) <= report.MOST_POINTS
        total = sum(weight * mean for weight, mean in zip(curve["weight"], curve["mean"]) if weight)
        assert math.isclose(total, sum(loss for _, loss in losses), rel_tol=1e-5)


@pytest.mark.parametrize("line", [
    {"step": 1, "loss": 1, "sources": {"a": 5, "b": {"loss": "low"}, "c": {"loss": 1e999}, "d": {}, "e": {"loss": 2}}},
    {"step": 1, "loss": 1, "sources": ["a"]}, {"step": 0, "val_loss": 1, "val_sets": {"a": {"loss": [1]}, "b": 7}},
    {"step": 1, "val_loss": None, "val_sets": "x", "forgetting": "much"}, {"step": "one", "val_loss": 1.0},
    {"step": None}, {"step": 1, "loss": 1, "sources": {str(i): {"loss": i} for i in range(10_000)}}], ids=str)
def test_sets_and_sources_that_are_damaged_end_nothing(line, tmp_path):
    run = make_full_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(line).replace("Infinity", "1e999") + "\n")
    (run / "ledger.json").write_text('{"resumes": [1, "two", null, 10]}')
    read = report.Run(run)
    assert read.resumes == [1, 10] and len(read.sources) <= report.MOST_NAMES
    report.write(run)


@pytest.mark.parametrize("losses, texts", [
    ([3.1, 1.2349, 1.2345, 1.2345, 0.5], ["3.100", "1.23490", "1.23450", "1.234", "0.500"]),
    ([0.1, 0.10004], ["0.100000", "0.100040"]), ([1.0, 1.0 + 1e-15], ["1.000", "1.000"]), ([], []), ([2], ["2.000"])])
def test_losses_side_by_side_differ_in_two_digits(losses, texts):
    assert report.distinct(losses) == texts


def test_a_resume_is_recorded_where_it_was(train, tmp_path, monkeypatch):
    """In ledger.json, for the page. A resume from an earlier step trains the later ones again: their marks go."""
    short = write(tmp_path / "short.json", [{"prompt": f"{i}?", "response": "!"} for i in range(6)])
    flags = ("--train_data", short, "--max_length", 32, "--use_lora", "--batch_size", 2, "--save_steps", 1,
             "--keep_checkpoints", "all")

    def resumes():
        return report.Run(tmp_path / "out").resumes

    train(*flags, "--max_steps", 2)
    assert resumes() == []
    train(*flags, "--max_steps", 3, "--resume_from", "auto")
    train(*flags, "--max_steps", 4, "--resume_from", "auto")
    assert resumes() == [2, 3]
    train(*flags, "--max_steps", 4, "--resume_from", "out/checkpoints/step_1")
    assert resumes() == [1]


def test_an_unpaired_surrogate_in_a_text(tmp_path):
    report.write(make_run(tmp_path / "run", text="unpaired \ud83d, paired 🙂"))
    assert "unpaired ?, paired 🙂" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_long_run_is_thinned_fast_and_keeps_its_spikes(tmp_path):
    run = make_run(tmp_path / "run", steps=50_000)
    started = time.process_time()
    report.write(run)
    assert time.process_time() - started < 2  # measured: 0.3; other tests share the cores
    curves = report.Run(run).curves()
    train = curves["train"]
    assert 900 < len(train["step"]) <= 2000
    assert train["step"][-1] == 50_000
    assert len(curves["val"]["step"]) == 2500
    spike = train["step"].index(40)
    assert train["loss"][spike] == max(train["loss"])
    assert train["grad_norm"][spike] == 51
    assert sum(train["weight"]) == 50_000
    total = sum(weight * mean for weight, mean in zip(train["weight"], train["mean"]))
    assert math.isclose(total, sum(report.Run(run).train["loss"]), rel_tol=1e-9)


def test_the_command_escapes_the_name_of_a_run(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "a\x1b[2J", steps=1)
    monkeypatch.setattr(sys, "argv", ["report.py", str(run)])
    command.main()
    assert r"a\x1b[2J/report.html" in capsys.readouterr().out


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # in an activated environment the page would say python
    for name in ("a b", "c"):
        make_run(tmp_path / name)

    def run(*arguments):
        arguments = sys.executable, f"{ROOT}/tools/report.py", *arguments
        return subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)

    assert run("a b").stdout == "report   a b/report.html\n"
    page = (tmp_path / "a b" / "report.html").read_text()
    assert f"{sys.executable} {ROOT}/chat.py &#39;a b/checkpoints/latest&#39;" in page
    assert run("a b", "c").stdout == "report   comparison.html\n"
    assert run("c", "--output", "x.html").stdout == "report   x.html\n"
    failed = run("c", "d")
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("report.py: error: d is not a run: it has no metrics.jsonl; pass")


class Browser:
    """Headless Chromium, controlled through chromedriver's HTTP interface with the standard library alone."""

    def __init__(self, profile):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        line = next(line for line in self.driver.stdout if "successfully on port" in line)
        self.address = f"http://127.0.0.1:{line.split()[-1].rstrip('.')}/session"
        flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", f"user-data-dir={profile}"]
        options = {"goog:chromeOptions": {"args": flags}, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self.address += "/" + self.call("", {"capabilities": {"alwaysMatch": options}})["sessionId"]

    def call(self, path, values, method="POST"):
        request = urllib.request.Request(self.address + path, json.dumps(values).encode(), method=method)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def devtools(self, command, **values):
        return self.call("/goog/cdp/execute", {"cmd": command, "params": values})

    def open(self, path, width=1200, scheme="light"):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        self.scheme(scheme)
        self.logs()  # drops those of the previous page
        self.call("/url", {"url": path.resolve().as_uri()})

    def scheme(self, name):
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])
        frames = "const [done] = arguments; requestAnimationFrame(() => requestAnimationFrame(() => done()))"
        self.call("/execute/async", {"script": frames, "args": []})  # the page notices it in its next frame

    def run(self, body, *arguments):
        """Run the body of a JavaScript function in the page; return its result."""
        return self.call("/execute/sync", {"script": body, "args": arguments})

    def logs(self):
        """(console messages, requested URLs that are not files) since the last call."""
        console = [entry["message"] for entry in self.call("/se/log", {"type": "browser"})]
        events = [json.loads(e["message"])["message"] for e in self.call("/se/log", {"type": "performance"})]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return console, [url for url in urls if not url.startswith(("file:", "data:"))]

    def close(self):
        self.call("", {}, "DELETE")
        self.driver.terminate()
        self.driver.communicate()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


# For each chart: how many pixels have about this color.
PIXELS = """const [color] = arguments;
return Object.fromEntries(Object.entries(charts).map(([name, {ctx}]) => {
  const {width, height} = ctx.canvas, copy = new OffscreenCanvas(width, height).getContext("2d");
  copy.drawImage(ctx.canvas, 0, 0);
  const {data} = copy.getImageData(0, 0, width, height);
  let n = 0;
  for (let i = 0; i < data.length; i += 4)
    n += data[i + 3] > 200 && color.every((value, k) => Math.abs(data[i + k] - value) < 12);
  return [name, n];
}))"""
BLUE, ORANGE, GRID, GRID_IN_DARK = [59, 130, 246], [239, 138, 31], [226, 229, 234], [43, 50, 60]


def test_browser_logs_have_errors_and_requests(browser, tmp_path):
    (tmp_path / "bad.html").write_text("<img src=http://127.0.0.1:9/x.png><script>undefined.x</script>")
    browser.open(tmp_path / "bad.html")
    console, urls = browser.logs()
    assert any("TypeError" in line for line in console) and urls == ["http://127.0.0.1:9/x.png"]


def test_page(browser, tmp_path):
    """All charts are drawn in the colors of the scheme; the page fits a phone, fetches nothing and has no errors."""
    report.write(make_run(tmp_path / "run", use_lora=True))
    browser.open(tmp_path / "run" / "report.html", width=375)
    assert browser.run("return document.documentElement.scrollWidth") <= 375
    for scheme, grid, other in ("light", GRID, GRID_IN_DARK), ("dark", GRID_IN_DARK, GRID):
        browser.scheme(scheme)
        pixels = browser.run(PIXELS, BLUE)
        assert len(pixels) == 5
        assert min(pixels.values()) > 50
        assert min(browser.run(PIXELS, grid).values()) > 100 > max(browser.run(PIXELS, other).values())
    body = browser.run("return document.body.innerText")
    for text in ("answer 60 你好 🙂", "2 earlier", "best 你好 🙂", "data/x.json[3] 你好 🙂, 12 target tokens",
                 "rows     9 in", "tools/merge.py", "after step 40"):
        assert text in body
    assert body.count("worst 你好") == 1  # only the last step's
    assert browser.logs() == ([], [])


@pytest.mark.full
@pytest.mark.parametrize("width, scheme", [(1200, "light"), (1200, "dark"), (390, "light"), (390, "dark")])
def test_everything_on_a_desktop_on_a_phone_and_in_the_dark(browser, tmp_path, width, scheme):
    """The page is as wide as the screen, and so is each table, which scrolls rather than squeezes; all charts are
    drawn."""
    runs = [make_full_run(tmp_path / name, lr=lr) for name, lr in (("one", 1e-4), ("two", 2e-4))]
    for page in report.write(runs[0]), report.build(runs, str(tmp_path / "both.html")):
        browser.open(tmp_path / page, width=width, scheme=scheme)
        assert browser.run("return document.documentElement.scrollWidth") <= width
        pixels = browser.run(PIXELS, ORANGE if "both" in page else BLUE)  # the second run is drawn over the first
        assert len(pixels) == 10 and min(pixels.values()) > 50, pixels
        tables = browser.run("""return [...document.querySelectorAll("main > .scroll")].map(box => {
          const rows = [...box.querySelectorAll("tr")];
          box.scrollLeft = 1000;
          const [name, at] = [box.querySelector("tr:last-child > th"), box].map(part => part.getBoundingClientRect());
          return [box.scrollWidth, box.clientWidth, Math.max(...rows.map(row => row.getClientRects()[0].height)),
                  box.scrollLeft, name.left - at.left, name.width];
        })""")
        assert len(tables) == (2 if "both" in page else 1)
        if width < 500 or "both" not in page:
            assert any(inside > outside for inside, outside, *_ in tables) == (width < 500)
        for inside, outside, height, scrolled, left, name_width in tables:
            assert height < 110  # the name has a few lines; in a squeezed table it has many
            assert (scrolled > 0) == (inside > outside) and 0 <= left < 30 and name_width < 0.45 * width + 30
        text = browser.run("return document.body.innerText")
        assert "esumed after steps 60, 120" in text
        if "both" not in page:
            assert "1.23490 " in text and "1.23450 " in text and "Validation sets" in text
        assert browser.logs() == ([], [])


@pytest.mark.full
def test_the_mark_of_a_resume_is_where_its_step_is(browser, tmp_path):
    """On each axis, in a chart with a line of another color there: the text's color, in both schemes."""
    report.write(make_full_run(tmp_path / "run"))
    for scheme, color in ("light", [28, 32, 36]), ("dark", [228, 231, 235]):
        browser.open(tmp_path / "run" / "report.html", scheme=scheme)
        for axis in "step", "tokens", "seconds":
            browser.run("axis.value = arguments[0]; axis.onchange()", axis)
            shares = browser.run("""const {ctx, bbox: {left, top, width, height}} = charts.lr, found = [];
            const [color] = arguments;
            const {data} = ctx.getImageData(left, top, width, height);
            for (let x = 0; x < width; x++) {
              let n = 0;
              for (let y = 0; y < height; y++)
                n += color.every((value, k) => Math.abs(data[4 * (y * width + x) + k] - value) < 40)
                     && data[4 * (y * width + x) + 3] > 100;
              if (n > height / 5) found.push(x / width);
            }
            return found""", color)
            groups = [share for i, share in enumerate(shares) if not i or share - shares[i - 1] > 0.02]
            # the axis begins at the first step
            assert groups == pytest.approx([59 / 199, 119 / 199], abs=0.02), (scheme, axis, shares)


def test_smoothing_is_over_all_steps(browser, tmp_path):
    """The debiased exponential mean equals its definition, in a thinned run approximately, at the steps it keeps."""
    for steps, tolerance in (60, 1e-6), (5000, 0.02):
        report.write(make_run(tmp_path / str(steps), steps=steps))
        browser.open(tmp_path / str(steps) / "report.html")
        shown = browser.run("smoothing.value = DECAYS.indexOf(0.9); smoothing.oninput(); return charts.loss.data")
        assert browser.run("return decay.value") == "0.9"
        mean = weight = 0.0
        train = report.Run(tmp_path / str(steps)).train
        for step, loss in zip(train["step"], train["loss"]):
            mean, weight = 0.9 * mean + 0.1 * loss, 0.9 * weight + 0.1
            if step in shown[0]:
                assert math.isclose(shown[2][shown[0].index(step)], mean / weight, rel_tol=tolerance)


def test_runs_overlaid(browser, tmp_path):
    """Each run has a color in every chart and a name in the legend; a table has the settings that differ. The same
    over time and on log scale."""
    runs = [make_run(tmp_path / f"{lr}" / "out", steps=steps, lr=lr) for steps, lr in ((60, 1.0), (40, 2.0))]
    browser.open(tmp_path / report.build(runs, tmp_path / "both.html"))
    for script in "", "axis.value = 'seconds'; axis.onchange()", "log.checked = true; log.onchange()":
        browser.run(script)
        for color in BLUE, ORANGE:
            pixels = browser.run(PIXELS, color)
            assert len(pixels) == 5
            assert min(pixels.values()) > 50
    assert browser.run("return ['loss', 'grad_norm', 'lr'].map(name => charts[name].scales.y.distr)") == [3, 3, 1]
    labels = browser.run("return [...document.querySelectorAll('figure:first-child .u-label')].map(l => l.textContent)")
    assert labels == ["seconds", "each step", *(f"{runs[0]}{s}" for s in ("", ", val")),
                      "each step", *(f"{runs[1]}{s}" for s in ("", ", val"))]  # both are named `out`: paths are shown
    rows = browser.run("return [...document.querySelectorAll('.scroll tr')].map(row => row.cells[0].innerText)")
    assert rows == ["Run", *map(str, runs), "", "lr"]
    assert browser.logs() == ([], [])


def test_text_from_data_and_settings_is_never_executed(browser, tmp_path):
    """Markup planted wherever data and settings appear is shown literally."""
    run = make_run(tmp_path / "run", text=NASTY, run_name=NASTY, train_data=NASTY)
    for directories in [run], [run, make_run(tmp_path / NASTY.replace("/", "∕"), text=NASTY)]:
        browser.open(tmp_path / report.build(directories, tmp_path / "page.html"))
        assert browser.run("return [window.ran, document.scripts.length, document.images.length]") == [None, 2, 0]
        text = browser.run("return document.body.textContent")
        for start, end in ("answer 60 ", ""), ("prompt ", ""), ("worst ", ""), ("[3] ", ", 12 target tokens"):
            assert start + NASTY + end in text
        assert browser.run("return document.title").startswith("</script><script>")
        assert browser.logs() == ([], [])


@pytest.mark.parametrize("metrics", ["", '{"step": 1, "loss": NaN}\n'])
def test_a_page_without_numbers(browser, tmp_path, metrics):
    (tmp_path / "metrics.jsonl").write_text(metrics)
    report.write(tmp_path)
    browser.open(tmp_path / "report.html")
    assert browser.run("log.checked = true; log.onchange(); return Object.keys(charts).length") == 5
    assert browser.logs() == ([], [])
