"""The claim to a run directory on an object store, which knows no rename and, as fsspec has it, no exclusive creation.

    RUN/claim.json     whose it is: who writes it last has it, so who takes it looks once more after a moment
    RUN/claims/LIFE    that it is renewed; apart, for who renews must not overwrite what another has taken meanwhile

Should two jobs have it all the same, the one that was overwritten sees that at its next renewal, and writes nothing from then
on: its world ends with the next step.
"""

import contextlib
import threading
import time
from typing import Any

from elastic_gpt.claim import RENEW_SECONDS, SETTLE_SECONDS, Claim, read_claim
from elastic_gpt.contract import CLAIM
from elastic_gpt.identity import directory
from elastic_gpt.mirror import Mirror

RENEWALS = "claims"


class StoreClaim(Claim):
    """As a Claim; `mirror` is of the run directory."""

    def __init__(self, mirror: Mirror, life: str, processes: list[dict[str, Any]]) -> None:
        super().__init__(mirror.folder, life, processes)
        self.mirror = mirror

    def take(self, run_id: str) -> bool:
        """As Claim.take. Raises Unreachable if the store does not answer."""
        self.content |= {"run_id": run_id, "directory": directory(self.mirror.folder)}
        mine, claim = False, self._look()
        while claim is None or claim["life"] != self.life:
            mine = self._judge(claim)
            self.path.write_text(self._text(0))
            self.mirror.put(CLAIM)
            if mine:
                break
            time.sleep(SETTLE_SECONDS)
            claim = self._look()
        threading.Thread(target=self._renew, name="claim", daemon=True).start()
        return mine

    def release(self) -> None:
        """The job is over: the next need not wait."""
        self.ended.set()
        with contextlib.suppress(OSError):  # a store that is away: it expires
            claim = self._look()
            if claim and claim["life"] == self.life:
                self.mirror.delete(CLAIM)
            self.mirror.delete(f"{RENEWALS}/{self.life}")

    def _look(self) -> dict[str, Any] | None:
        self.mirror.pull(CLAIM)
        claim = read_claim(self.path)
        return claim and claim | {"renewed": self.mirror.text(f"{RENEWALS}/{claim['life']}")}

    def _renew(self) -> None:
        count = 0
        while not self.ended.wait(RENEW_SECONDS):
            count += 1
            with contextlib.suppress(OSError):  # a store that is away: again in a moment
                claim = self._look()
                if claim and claim["life"] == self.life:
                    self.mirror.write_text(f"{RENEWALS}/{self.life}", str(count))
                elif claim:
                    if self.mirror.life == self.life:  # else this worker has gone on to the next
                        self.mirror.fenced = True
                    self.mirror.delete(f"{RENEWALS}/{self.life}")
                    return
