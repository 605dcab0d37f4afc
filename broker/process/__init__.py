"""What every long-running process needs: settings, logs, metrics, life cycle."""
