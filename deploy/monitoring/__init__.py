"""What watches a run: recording rules, alerts, dashboards, and a Prometheus for the run on this machine."""
