// Value: the JSON of {atlases, comparison}, see `drawAtlas`. A file in a run's folder may be anyone's, so it may be no
// atlas after all.
function receive(value) {
  const place = $(".atlas");
  place.replaceChildren();
  if (!value) return;
  try {
    drawAtlas(place, JSON.parse(value));
  } catch (error) {
    const line = "This atlas cannot be shown: it is damaged. Compute it again.";
    place.replaceChildren(make("p", { className: "broken" }, line));
  }
}

watch("value", () => receive(props.value));
receive(props.value);
