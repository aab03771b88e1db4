"""The k6 program: found, built once, and run with a script."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import threading

from .process import EnvironmentFault

VERSION = "v1.8.1"
# Its go.mod names this version.
GO_MIN = (1, 25)
BIN = pathlib.Path.home() / ".cache/tidegate/bin"
LABEL = "event: "
# A run that takes longer than its script says has hung.
END_SECONDS = 60
STOP_SECONDS = 3


class K6Missing(EnvironmentFault):
    """There is no k6, and no Go that could build it."""


def find():
    """The path of k6 among the tools that were built before, or on the PATH; None without."""
    built = BIN / "k6"
    found = str(built) if os.access(built, os.X_OK) else shutil.which("k6")
    return found if found and is_current(found) else None


def is_current(k6):
    """Whether it is a version 1: older ones have another summary."""
    shown = subprocess.run([k6, "version"], capture_output=True, text=True, check=False).stdout
    return re.match(r"k6(\.exe)? v([1-9][0-9]*)\.", shown) is not None


def go_version():
    go = shutil.which("go")
    if go is None:
        return None
    words = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, check=False).stdout.strip()
    numbers = words.removeprefix("go").split(".")[:2]
    return tuple(map(int, numbers)) if len(numbers) == 2 and all(it.isdigit() for it in numbers) else None


def find_or_build():
    """The path of k6; builds it with Go (about two minutes, once) if it is absent."""
    found = find()
    if found:
        return found
    go = go_version()
    if go is None or go < GO_MIN:
        wanted = ".".join(map(str, GO_MIN))
        raise K6Missing(f"k6 is neither on the PATH nor in {BIN}; install it, or Go {wanted} or later, which builds it")
    print(f"building k6 {VERSION} into {BIN} (about two minutes, once)", flush=True)
    done = subprocess.run(["go", "install", f"go.k6.io/k6@{VERSION}"], env={**os.environ, "GOBIN": str(BIN)}, check=False)
    if done.returncode != 0:
        # Not skipped as an absent Go is: what is there does not work.
        raise EnvironmentFault(f"go install go.k6.io/k6@{VERSION} has failed")
    return str(BIN / "k6")


class K6Run:
    """One run of a script. `on_event` gets the name and the text of each event line, in order."""

    def __init__(self, k6, script, report, settings, on_event):
        self.script, self.on_event = script, on_event
        self.html, self.json = report / f"{script.stem}.html", report / f"{script.stem}.json"
        self.messages = []
        for stale in (self.html, self.json):
            stale.unlink(missing_ok=True)
        environment = {
            **os.environ, **settings, "SUMMARY": str(self.json), "K6_NO_USAGE_REPORT": "true",
            "K6_WEB_DASHBOARD": "true", "K6_WEB_DASHBOARD_PORT": "-1", "K6_WEB_DASHBOARD_PERIOD": "1s",
            "K6_WEB_DASHBOARD_EXPORT": str(self.html),
        }
        command = [k6, "run", "--quiet", "--address", "", "--log-format", "raw", "--include-system-env-vars", str(script)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True)
        self.failure = None

    def wait(self, seconds):
        """The exit status of k6, after at most `seconds`."""
        reader = threading.Thread(target=self.read_lines, daemon=True)
        reader.start()
        timer = threading.Timer(seconds + END_SECONDS, self.process.kill)
        # Threads that are no daemons would keep an interrupted runner alive.
        timer.daemon = True
        timer.start()
        self.table = self.process.stdout.read()
        status = self.process.wait()
        timer.cancel()
        reader.join(END_SECONDS)
        if self.failure is not None:
            raise self.failure
        return status

    def stop(self):
        """Ends k6 early: its own orderly end, for a moment."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def read_lines(self):
        for line in self.process.stderr:
            line = line.rstrip("\n")
            if line.startswith(LABEL):
                name, _, text = line.removeprefix(LABEL).partition(": ")
                try:
                    self.on_event(name, text)
                except (EnvironmentFault, OSError, ValueError) as failure:
                    self.failure = EnvironmentFault(f"event {name}: {failure}")
                    self.process.terminate()
            # The warning of k6 for each request without a response; the scripts describe the first
            # ones themselves.
            elif line != "Request Failed":
                self.messages.append(line)

    def summary(self):
        """The JSON summary; None if the run ended before the load."""
        return json.loads(self.json.read_text()) if self.json.exists() else None
