"""The claim to a run directory on an object store, where fsspec has neither renames nor exclusive creation.

    RUN/claim.json     which job has the claim: the last one to write it, so a job checks after a moment that it still has it
    RUN/claims/LIFE    renewals; a file of its own, so that a renewal never overwrites the claim of another job

If two jobs have the claim all the same, the one that was overwritten notices it at its next
renewal. It writes nothing from then on, and its world ends with the next step.
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
    """Has the interface of Claim. `mirror` is the mirror of the run directory."""

    def __init__(self, mirror: Mirror, life: str, processes: list[dict[str, Any]]) -> None:
        super().__init__(mirror.folder, life, processes)
        self.mirror = mirror

    def take(self, run_id: str) -> bool:
        """See Claim.take. Also raises Unreachable if the store does not answer."""
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
        """Give the claim back at the end of the job, so that the next one does not have to wait."""
        self.ended.set()
        with contextlib.suppress(OSError):  # the store is away, so the claim expires by itself
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
            with contextlib.suppress(OSError):  # the store is away: try again in a moment
                claim = self._look()
                if claim and claim["life"] == self.life:
                    self.mirror.write_text(f"{RENEWALS}/{self.life}", str(count))
                elif claim:
                    if self.mirror.life == self.life:  # if not, this worker is in the next life already
                        self.mirror.fenced = True
                    self.mirror.delete(f"{RENEWALS}/{self.life}")
                    return
