"""The server's numbers are Prometheus', and are true."""

from prometheus_client.parser import text_string_to_metric_families

from model_zoo.nanogpt.serving.metrics import Metrics
from tests.nanogpt.serving.conftest import small


def test_metrics_are_prometheus_and_count_what_happened() -> None:
    with small(slots=2) as served:
        served.complete(prompt="abc", max_tokens=5, n=2)
        served.http.post("/v1/completions", json={})
        answer = served.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    route = ("route", "/v1/completions")
    assert samples["elastic_gpt_requests_total", route, ("status", "200")] == 1
    assert samples["elastic_gpt_requests_total", route, ("status", "400")] == 1
    assert samples["elastic_gpt_request_seconds_count", route] == 2
    assert samples[("elastic_gpt_prompt_tokens_total",)] == 6
    assert samples[("elastic_gpt_generated_tokens_total",)] == 10
    assert samples[("elastic_gpt_first_token_seconds_count",)] == 2
    assert samples[("elastic_gpt_token_seconds_count",)] == 8
    assert samples[("elastic_gpt_batch_size_sum",)] == 10
    assert samples[("elastic_gpt_model_step",)] == 7
    assert samples[("elastic_gpt_queue_length",)] == samples[("elastic_gpt_running_generations",)] == 0


def test_two_servers_of_one_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.generated_tokens.inc(3)
    assert b"elastic_gpt_generated_tokens_total 3.0" in first.text()
    assert b"elastic_gpt_generated_tokens_total 0.0" in second.text()
