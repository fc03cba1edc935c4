"""What goes out: every row to one place, with a report and a card, where nothing is half replaced."""
