"""From rollouts and rewards to the policy's update."""
