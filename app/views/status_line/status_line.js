// Value: {text, tone}: the line, and "bad" for an error.
function receive(value) {
  const { text = "", tone = "" } = value || {};
  $("p").dataset.tone = tone;
  $("p").textContent = text;
}

watch("value", () => receive(props.value));
receive(props.value);
