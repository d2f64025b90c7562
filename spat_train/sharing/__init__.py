"""Trained models for others: exported with a card that says what they are, how they were trained and how robust they are."""
