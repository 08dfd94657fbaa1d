"""The shipped recipes: `litflora recipes` lists them."""
