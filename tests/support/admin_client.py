"""What an operator sees of a running gateway: the documents and metrics of its admin listener."""

import asyncio
import json
from dataclasses import dataclass

import aiohttp
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Page:
    status: int
    text: str


async def page(gateway, path: str) -> Page:
    """What is there; asked again until it is, where the listener is asked too often."""
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"http://{gateway.admin_address}{path}") as answer:
                if answer.status != 429:
                    return Page(answer.status, await answer.text())
            await asyncio.sleep(0.05)


async def api(gateway, name: str):
    """The document /api/{name}."""
    shown = await page(gateway, f"/api/{name}")
    assert shown.status == 200
    return json.loads(shown.text)


class Scrape:
    """One reading of /metrics."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that have these labels; 0 when there is none."""
        return sum(
            sample.value for sample in self.samples if sample.name == name and labels.items() <= sample.labels.items()
        )

    def series(self, name: str) -> list[dict[str, str]]:
        return [sample.labels for sample in self.samples if sample.name == name]


async def scrape(gateway) -> Scrape:
    shown = await page(gateway, "/metrics")
    assert shown.status == 200
    return Scrape(shown.text)
