"""Single edits of right tables: each must be refused, or leave the program what the plain one is."""
