"""What ``xsd bench explorer`` measures, on a table of 40 answers; no speed is asserted."""

import json

from benchmarks import explorer
from xsd.evaluate import table


def test_every_control_is_measured_on_a_table_of_the_documented_form(tmp_path):
    sizes = explorer.Sizes(samples=40, positions=6, sequences=4, actions=3)
    tokens = explorer.token_table(sizes)
    assert len(tokens) == 40 * 6 * 3 and len(table.counts(tokens, gamma=5)) == 120
    text = explorer.run(tmp_path, sizes)
    facts = json.loads((tmp_path / "ratios.json").read_text())["facts"]
    assert facts["rows"] == 720 and set(facts["action_ms"]) == {
        "threshold", "accepted by", "curve", "levels", "position", "sample", "search"}
    assert all(f"| {name} |" in text for name in facts["action_ms"])
