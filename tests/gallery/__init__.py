"""Tables and models over the debug Llama that the checker must refuse, and others that it must accept."""
