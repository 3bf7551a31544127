"""What the page shows, and how: figures, words, tables, and the template that holds them."""
