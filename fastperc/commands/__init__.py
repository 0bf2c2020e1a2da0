"""One module a command: ``add`` tells the parser of it, ``run`` runs it. Nothing heavy is imported before ``run``."""
