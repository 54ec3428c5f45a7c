"""Serves a trained model over HTTP. Only this package imports FastAPI, uvicorn and Prometheus' client (the extra `serve`).

serve.py is the command; app.py the server; openai.py, vertex.py and kserve.py one dialect each; completions.py text in and
out; scheduler.py the one engine that all requests share; follow.py newer checkpoints; connections.py
who connects and says nothing; page/ what a browser shows.
"""
