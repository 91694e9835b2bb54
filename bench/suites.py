"""The suites by name."""

from bench.heads import Dpo, Head, Models, Scaling
from bench.row_suites import Logits, Tail
from bench.suite import Suite

SUITES: dict[str, Suite] = {s.name: s for s in (Head(), Dpo(), Tail(), Logits(), Scaling(), Models())}
