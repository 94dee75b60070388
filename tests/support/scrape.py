"""What the metrics endpoint says, read by Prometheus' own parser."""

import urllib.request
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

# Straight to the loopback address, whatever proxy the environment names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Scrape:
    """One scrape: samples by name and labels."""

    def __init__(self, text: str) -> None:
        families = list(text_string_to_metric_families(text))
        # A metric that has labels, but no series yet, is there all the same.
        self._known = {family.name for family in families}
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    @classmethod
    def of(cls, address: str) -> Self:
        with _OPENER.open(f"http://{address}/metrics", timeout=10) as response:
            return cls(response.read().decode())

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self._samples}

    def value(self, name: str, **labels: str) -> float:
        """One sample's value; 0 for a series that does not exist yet. Raises KeyError for an unknown metric."""
        if name not in self.names and name.removesuffix("_total") not in self._known:
            raise KeyError(name)
        return self._samples.get((name, frozenset(labels.items())), 0.0)

    def above(self, histogram: str, bound: float) -> float:
        """How many observations of a histogram are over a bound of its buckets."""
        return self.value(f"{histogram}_count") - self.value(f"{histogram}_bucket", le=str(float(bound)))
