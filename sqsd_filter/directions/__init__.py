"""Direction packs: built, imported, inspected and tested; and what a fine-tune does along their directions."""
