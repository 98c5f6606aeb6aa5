"""What was measured: counter, idle floor, sensors, phases, memory."""
