from sd_memguard.audit.reporting.card import BEGIN, END, update_card
from tests.audit.planted_audit import planted_generated, write_planted_audit


def test_a_section_is_added_once_and_replaced_later(tmp_path):
    generated = planted_generated()
    report = write_planted_audit(tmp_path / "audit", generated)
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n# My model\n", encoding="utf-8")
    update_card(card, report)
    once = card.read_text(encoding="utf-8")
    assert once.startswith("---\nlicense: mit\n---\n# My model\n\n" + BEGIN)
    assert "plain returns its training images; guarded shows no replication above the background." in once
    card.write_text(once + "More words.\n", encoding="utf-8")
    update_card(card, report)
    assert card.read_text(encoding="utf-8") == once + "More words.\n"
    assert once.count(BEGIN) == once.count(END) == 1
    for secret in ("runs/plain", generated[0].caption, generated[0].own_file):
        assert secret not in once
    update_card(tmp_path / "new.md", report)
    assert (tmp_path / "new.md").read_text(encoding="utf-8").startswith(BEGIN)
