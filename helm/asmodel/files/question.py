"""What `helm test` runs: which models there are and, where one is named, a question to it, through the Service."""

import json
import os
import sys
import urllib.error
import urllib.request

ADDRESS, KEY = os.environ["ADDRESS"], os.environ["KEY"]
MODEL, QUESTION, TIMEOUT = os.environ["MODEL"], os.environ["QUESTION"], float(os.environ["TIMEOUT"])


def ask(path, body=None):
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    request = urllib.request.Request(ADDRESS + path, body and json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        sys.exit(f"{path}: {error.code} {error.read().decode(errors='replace')}")


models = [model["id"] for model in ask("/models")["data"]]
print("models:", ", ".join(models))
if MODEL:
    answer = ask("/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}]})
    text = answer["choices"][0]["message"]["content"]
    print(f"{MODEL}: {text}")
    if not text:
        sys.exit("the answer is empty")
