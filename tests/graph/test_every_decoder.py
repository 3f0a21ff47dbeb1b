"""Every decoder of the grammar is computed as its plain meaning says, or refused when it is traced, with the user's line."""

import collections
import time

import pytest
from grammar.decoders import decoder
from grammar.families import FAMILIES, cuts, positions
from grammar.three_ways import check, graph_of
from hypothesis import given, settings
from laws import LAW

pytestmark = pytest.mark.medium
EXAMPLES = 90


@pytest.mark.parametrize("kind", FAMILIES)
def test_computed_or_refused(kind, record_property):
    seen: dict[str, str] = {}

    @settings(LAW, max_examples=EXAMPLES, print_blob=False)
    @given(FAMILIES[kind], cuts, positions)
    def law(spec, how, at):
        d = decoder(spec)
        graph = graph_of(d)
        for pos in at if graph else ():
            check(d, spec, graph, how, 3, pos)
        assert graph is None or spec.forbidden is None
        seen[repr(spec)] = "computed" if graph else "refused"

    law()
    counts = collections.Counter(seen.values())
    record_property("decoders", {"kind": kind, "programs": len(seen), "computed": counts["computed"], "refused": counts["refused"]})
