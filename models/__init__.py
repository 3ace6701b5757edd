"""Model families, one package each, and the job that trains them: `python -m models.train`."""
