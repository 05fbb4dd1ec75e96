"""The page at `/`: what is served, a form to try it, and the last runs with their timelines."""
