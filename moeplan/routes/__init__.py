"""`moeplan routes`: where tokens would go, from the scores that routers give them.

`statistics` counts, `advice` judges, `view` shows it in a terminal, `page` as HTML. What the routers score, and how, is
not known here.
"""
