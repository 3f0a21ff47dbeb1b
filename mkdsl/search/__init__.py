"""Finds a schedule, offline.

In: a graph, a batch, a profile. Out: the schedule that is predicted to be the fastest, proven. Its steps: candidates of each phase, tasks, the cost
model, the shortest path through all candidates for each ring, drafts that the simulator ranks, safe hand-offs. It never imports what lowers.
"""

from mkdsl.search._account import BOUNDS, Account, Summary, accounts, summary
from mkdsl.search._alternatives import Alternative, runners_up
from mkdsl.search._cost import floor_us
from mkdsl.search._draft import draft, timed
from mkdsl.search._files import digest, directory, discard, read, source_digest, write
from mkdsl.search._handoffs import with_handoffs
from mkdsl.search._report import explain
from mkdsl.search._rings import RINGS, cheapest, rings
from mkdsl.search._search import search, without_k_split

__all__ = [
    "BOUNDS", "RINGS", "Account", "Alternative", "Summary", "accounts", "cheapest", "digest", "directory", "discard", "draft", "explain",
    "floor_us", "read", "rings", "runners_up", "search", "source_digest", "summary", "timed", "with_handoffs", "without_k_split", "write",
]  # fmt: skip
