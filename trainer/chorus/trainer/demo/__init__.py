"""`chorus demo`: the whole product in two minutes, on the embedded base, with every claim checked as it is made."""
