"""Options, and the parser that reads them."""
