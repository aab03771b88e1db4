"""A page of metrics in the text format of Prometheus."""

import re

SAMPLE = re.compile(r"^([a-z_0-9]+)(?:\{(.*)\})? ([^ ]+)$")
LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')


class Metrics:
    """Samples by name and labels."""

    def __init__(self, page):
        self.samples = []
        for line in page.splitlines():
            found = None if line.startswith("#") else SAMPLE.match(line)
            if found:
                self.samples.append((found[1], dict(LABEL.findall(found[2] or "")), float(found[3])))

    def values(self, name, **labels):
        return [value for it, has, value in self.samples
                if it == name and all(has.get(label) == wanted for label, wanted in labels.items())]

    def sum(self, name, **labels):
        """The sum of all samples of a name with these labels; 0 without any."""
        return sum(self.values(name, **labels))
