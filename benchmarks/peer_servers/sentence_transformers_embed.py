"""MiniLM through sentence-transformers behind a plain FastAPI, each request by itself. PORT MODEL-DIRECTORY"""

import sys

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

app = FastAPI()
model = SentenceTransformer(sys.argv[2], device="cpu")


class Request(BaseModel):
    input: str
    model: str = ""


@app.post("/v1/embeddings")
def embed(request: Request):
    vector = model.encode([request.input], normalize_embeddings=True)[0]
    return {"data": [{"index": 0, "embedding": vector.tolist()}]}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
