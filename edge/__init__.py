"""What runs on the device: sources, student runtime, link estimate, switcher, cloud client, updater, agent."""
