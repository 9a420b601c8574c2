"""Steering in a request that did not come through vLLM's own application."""

import pytest
from starlette.requests import Request

from steer_server.api.carriers import admit_request


@pytest.mark.parametrize("body", [{"steering": {}}, {"vllm_xargs": {"steering": "{}"}}])
def test_another_front_end_is_refused_by_name(body):
    """Ray Serve hands vLLM's handlers a request of its own making, whose scope has no application."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    request = CompletionRequest(model="m", prompt="x", **body)
    elsewhere = Request({"type": "http", "headers": []})
    with pytest.raises(Exception, match="started without Steer Server's HTTP side"):
        admit_request(None, request, elsewhere)
