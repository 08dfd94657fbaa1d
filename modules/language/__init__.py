"""Language models, their tokens, and how images come among these."""
