"""The law: each decoder of a kind is computed as it is meant, or refused where it may be."""

from collections.abc import Callable, Sequence

from hypothesis import Phase, given, settings
from laws import LAW

from grammar.decoders import decoder
from grammar.families import FAMILIES, cuts, positions
from grammar.phases import Cuts
from grammar.spec import Spec
from grammar.three_ways import check, graph_of

TOKEN = 3


def is_within_the_language(spec: Spec) -> bool:
    """Whether a decoder must not be refused."""
    sized = (
        spec.head_dim % 16 == 0 and 64 <= spec.head_dim <= 256 and spec.context % 8 == 0 and (spec.fold == "none" or spec.hidden % 16 == 0)
    )
    usual = spec.turned != "halves" and spec.again != "appended" and spec.bias != "numbers" and not {"sum", "signs"} & set(spec.extra)
    return usual and sized and spec.forbidden is None


def computed_or_refused(spec: Spec, how: Cuts, at: Sequence[int]) -> str:
    """Which of the two; fails if it is neither as it should be."""
    d = decoder(spec)
    graph = graph_of(d)
    assert graph is None or spec.forbidden is None, "it was to be refused"
    assert graph is not None or not is_within_the_language(spec), "it was to be computed"
    if graph is None:
        return "refused"
    check(d, spec, graph, how, TOKEN, at)
    return "computed"


def law(kind: str, examples: int, *, phases: Sequence[Phase] = (Phase.generate, Phase.shrink)) -> tuple[Callable[[], None], dict[str, str]]:
    """The property to be called, and what became of each program that it has tried."""
    programs: dict[str, str] = {}
    tried: set[str] = set()

    @settings(LAW, max_examples=examples, phases=phases)
    @given(FAMILIES[kind], cuts, positions)
    def holds(spec: Spec, how: Cuts, at: list[int]) -> None:
        if (example := f"{spec} {how} {at}") not in tried:
            programs[repr(spec)] = computed_or_refused(spec, how, at)
            tried.add(example)

    return holds, programs


def drawn(kind: str, count: int, suits: Callable[[Spec], bool]) -> list[Spec]:
    """Decoders of a kind, from where hypothesis has come to larger ones."""
    specs: dict[str, Spec] = {}

    @settings(LAW, max_examples=60, phases=[Phase.generate])
    @given(FAMILIES[kind])
    def collect(spec: Spec) -> None:
        if suits(spec):
            specs[repr(spec)] = spec

    collect()
    assert len(specs) >= count
    return list(specs.values())[-count:]
