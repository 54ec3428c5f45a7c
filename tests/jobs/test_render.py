"""render.py: YAML says what the dicts say, and every comment stands somewhere."""

import pytest
import yaml
from hypothesis import example, given, settings

from elastic_gpt.jobs import commands
from elastic_gpt.jobs.manifest import PARTS, manifests
from elastic_gpt.jobs.render import NOTES, _places, to_yaml
from elastic_gpt.jobs.spec import JobSpec
from tests.jobs.test_manifest import specs


@settings(max_examples=40)
@example(JobSpec(env=(("A", "\x85\U000579e4`"), ("B", "a\u2028\n b"))))
@given(specs())
def test_a_job_is_the_same_each_time_and_yaml_says_what_the_dicts_say(spec: JobSpec) -> None:
    trees = manifests(spec, tuple(PARTS))
    assert manifests(spec, tuple(PARTS)) == trees  # nothing is shared between the calls that one could have changed
    assert list(yaml.safe_load_all(to_yaml(trees, "a heading"))) == trees


def test_every_note_stands_somewhere() -> None:
    uploading = JobSpec(spot=True, network_check=True, upload=(("a.txt", "text"),))
    found: dict[str, set[str]] = {}
    others = [tree for known, _ in commands.FORMS.values() for part in known.values() for tree in part(JobSpec())]
    for tree in [*manifests(uploading, tuple(PARTS)), *others]:
        node = yaml.compose(yaml.safe_dump(tree), Loader=yaml.SafeLoader)
        found.setdefault(tree["kind"], set()).update(path for path, _, _ in _places(node, ""))
    missing = [(kind, path) for kind, notes in NOTES.items() for path in notes if path not in found[kind]]
    assert missing == []


@pytest.mark.parametrize(
    "lines", [to_yaml(manifests(JobSpec(spot=True, network_check=True), tuple(PARTS))).splitlines()]
)
def test_lines_are_short_enough_to_read(lines: list[str]) -> None:
    assert [line for line in lines if len(line) > 128] == []
