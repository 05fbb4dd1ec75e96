"""`asmodel eval`: models against a file of questions, scored, counted, timed and compared with one another."""
