"""What one writes in an afternoon, FastAPI around transformers' generate: fastapi_peer.py MODEL PORT THREADS

The peer of bench/serving.py: greedy, each token sent at once, one request at a time (threads that generate at once on
one CPU are slower than one after the other), weights in the precision that they are stored in.
"""

import asyncio
import json
import queue
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

MODEL, PORT, THREADS = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(THREADS)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto", attn_implementation="sdpa").eval()
tokenizer = AutoTokenizer.from_pretrained(MODEL)
app, one_at_a_time = FastAPI(), threading.Lock()


class Tokens(BaseStreamer):
    """transformers' own waits for the end of a word; this one does not."""

    def __init__(self) -> None:
        self.queue: queue.Queue[torch.Tensor | None] = queue.Queue()

    def put(self, value: torch.Tensor) -> None:
        self.queue.put(value)

    def end(self) -> None:
        self.queue.put(None)


@app.post("/v1/completions")
async def complete(body: dict[str, Any]) -> StreamingResponse:
    tokens, ids = Tokens(), torch.tensor([body["prompt"]])
    limits = {"max_new_tokens": body["max_tokens"], "min_new_tokens": body["max_tokens"]}

    def generate() -> None:
        with one_at_a_time, torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, streamer=tokens,
                pad_token_id=tokenizer.eos_token_id, **limits,
            )  # fmt: skip

    async def events() -> AsyncIterator[str]:
        threading.Thread(target=generate).start()
        await asyncio.to_thread(tokens.queue.get)  # the prompt
        while (new := await asyncio.to_thread(tokens.queue.get)) is not None:
            yield f"data: {json.dumps({'choices': [{'text': tokenizer.decode(new)}]})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning")
